"""The model: conditioning on metadata, denoiser, objective, guidance, samplers, adapters, and the pipeline.

It has no training code, and reads and writes no files but model folders and adapters.
"""
