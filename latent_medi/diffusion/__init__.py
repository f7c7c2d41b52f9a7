"""The model: conditioning on metadata, denoiser, objective, guidance, samplers, and the pipeline of them all.

Model code only: no training loop, and no file but the pipeline's own model folder.
"""
