def models(as_json=False): return ""
hardware = figures = models
