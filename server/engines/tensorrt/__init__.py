"""TensorRT: plans are built from a bundle's graphs, kept in a folder that nobody else can write to, and run as stages.

bundles    a bundle's plans, built and opened: the way in
network    a graph becomes a plan
plans      the folder: keys, hashes, who may have written what
stage      a plan becomes a stage of the GPU runtime
gpus       which GPU there is, if any
api        what is used of TensorRT
"""
