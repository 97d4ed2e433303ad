"""CPU kernels in C++: what torch's operators cannot do in one pass over memory.

    csrc/*.{h,cpp}   plain C++17, no torch headers: compiles in seconds with g++ or clang++
    build            source ─▶ shared library in the user's cache directory, ahead or in the background
    prebuilt         libraries that came compiled, and which of them this processor can run
    library          loads one, checks it against the specification, or says once what is lost without it
    binding          its C interface
    operations       the CPU's table of operations, made of:
      attention      attention over the cache in place
      matrix         the form of each weight: oneDNN's, or
      linear         panels that these kernels multiply with: float32, bfloat16, int8, int4
      elementwise    norms, rotations and gates, each one pass
      decoder        all layers of a step in one call
      sampling       tokens and log-probabilities from logits
    tensors          which tensors they take
    scratch          memory that they work in

Importing this package imports nothing.
"""
