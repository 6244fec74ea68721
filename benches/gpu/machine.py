"""What the GPU's machine is, as JSON into the file that is named: the card, its driver, the libraries, the processor."""
import json
import os
import platform
import shutil
import subprocess
import sys
from importlib import metadata

FIELDS = ("name,driver_version,vbios_version,memory.total,memory.used,clocks.sm,clocks.mem,clocks.max.sm,power.limit,power.draw,"
          "temperature.gpu,persistence_mode,compute_mode,ecc.mode.current,pcie.link.gen.current,pcie.link.width.current")
PACKAGES = ("torch", "transformers", "peft", "bitsandbytes", "accelerate", "triton", "liger-kernel", "unsloth", "numpy", "safetensors")


def text(*command):
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=8)
        return (done.stdout or done.stderr).strip()
    except (OSError, subprocess.TimeoutExpired) as error:
        return f"{command[0]}: {error}"


def version(package):
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def cpu():
    with open("/proc/cpuinfo") as file:
        return next((line.split(":")[1].strip() for line in file if line.startswith("model name")), "")


card = dict(zip(FIELDS.split(","), text("nvidia-smi", f"--query-gpu={FIELDS}", "--format=csv,noheader").split(", ")))
found = {"card": card, "packages": {package: version(package) for package in PACKAGES}, "python": platform.python_version(),
         "kernel": platform.release(), "libc": "-".join(platform.libc_ver()), "cpu": cpu(), "cores": os.cpu_count(),
         "memory_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30),
         "cuda_libraries": os.environ.get("HONE_CUDA_LIBS", ""),
         "profilers": {name: shutil.which(name) for name in ("ncu", "nsys", "compute-sanitizer")}}
with open(sys.argv[1], "w") as file:
    json.dump(found, file, indent=1)
