"""Documented commands that other tests run, and those that need what no test has."""

ELSEWHERE = {
    # Beginning of a command: the test that runs it, and a text that its code has or a function that it calls.
    "latent-medi run --config tcga_ut/paper": ("end_to_end/test_tcga_ut_paper.py", "tcga_ut/paper"),
    "latent-medi run --config tcga_ut/beyond": ("end_to_end/test_tcga_ut_paper.py", "tcga_ut/beyond"),
    "latent-medi run --config histodiffusion/demo": ("experiment/test_image_classifiers.py", "histodiffusion/demo"),
    "latent-medi run --config histodiffusion/crc": ("end_to_end/test_histodiffusion_crc.py", "histodiffusion/crc"),
    "latent-medi run --config histodiffusion/prostate": (
        "experiment/test_image_classifiers.py",
        "histodiffusion/prostate",
    ),
    "latent-medi shards tcga-ut SOURCE OUT": ("recipes/test_recipes.py", "tcga-ut"),
    "latent-medi shards tcga-tiles": ("recipes/test_recipes.py", "tcga-tiles"),
    "latent-medi reading-sheet --score": ("report/test_reading_sheet.py", "score_sheet"),
    "latent-medi benchmark-shift": ("end_to_end/test_benchmark_shift.py", "benchmark-shift"),
    "latent-medi benchmark-shift --mean": ("experiment/test_shift_benchmark.py", "--mean"),
    "latent-medi run --config … dry_run=true": ("experiment/test_cost.py", "dry_run=true"),
    "python docs/architecture.py": ("test_architecture.py", "architecture.drawing"),
    "latent-medi explore": ("test_explore.py", "explore"),
    "latent-medi demo": ("test_gpu_runner.py", "--quick"),
    "latent-medi doctor": ("test_doctor.py", "doctor"),
    "python docs/metrics.py": ("evaluation/test_results.py", "metrics.py"),
    "python -m latent_medi.demo.pretrain": ("demo/test_weights.py", "tissue_bank"),
    "python -m latent_medi.shards.slides.job": ("shards/slides/test_slides.py", "run_slide"),
    "python -m latent_medi.launch … -m latent_medi.cli run": ("experiment/test_launching.py", "latent_medi.launch"),
    "python -m latent_medi.launch OPTIONS -m latent_medi.cli run": (
        "experiment/test_launching.py",
        "latent_medi.launch",
    ),
    "make gpu-kit": ("end_to_end/test_kit.py", "builder.build"),
    "sh kit-dist/start.sh": ("end_to_end/test_kit.py", "start.sh"),
    "cd gpu-work": ("end_to_end/test_kit.py", "latent_medi"),
    "python benchmarks/gpu.py --quick --device cpu": ("gpu", "cpu"),
    "LATENT_MEDI_WEIGHTS=/path/to/weights pytest -m weights": ("weights/test_published_weights.py", "load_autoencoder"),
}

NEEDS = {
    # Beginning of a command: what it needs, in words of its page.
    "hf auth login": "licence",
    "hf download": "connection",
    "hf upload": "hf auth login",
    "gdc-client download": "need a connection",
    "pip install": "pip install",
    "source .venv/bin/activate": "make",
    "wandb sync": "without a connection",
    "pytest -m gpu": "GPU",
    "python3 --version": "python3",
    "sbatch --nodes 2 --gpus-per-node 8 configs/cluster/slurm.sh -m latent_medi.cli run": "sbatch",
    "python -m latent_medi.launch --config_file configs/accelerate/two_nodes.yaml --machine_rank 0 --main_process_ip "
    "10.0.0.1 -m latent_medi.cli run": "several nodes",
    "python patching_peer.py": "that program's Python",
    "sbatch --export": "Slurm",
}
