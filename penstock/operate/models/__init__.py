"""The store of models: one folder, in which each version of a model's files is whole, or not there at all.

STORE/
└─ Qwen/Qwen3-8B/               a model, by its name
   ├─ versions/3f9c…/           files, read-only; a file that two versions share is there once (hard links)
   │  └─ .penstock.json         the manifest: size and sha256 of each file, and where they came from
   ├─ snapshots/2026-11-22T06-30-00Z/   hard links to a version, as `cp -al` makes them
   ├─ current → versions/3f9c…  what is served; changed in one step
   ├─ history.json              what current was, and when; pins
   ├─ .partial/                 what has not come whole yet, for the next pull to go on with
   └─ .lock                     held by whoever changes something: a second pull waits, and finds it there

manifest   files, their checksums, and whether they are still so
store      the folder: versions, snapshots, current, pins, pruning
local      from a folder          hub   from Hugging Face: resumed, patient, verified
drill      whether a copy could be served: restored, verified, opened, timed
"""
