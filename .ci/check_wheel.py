"""Fails unless a wheel holds every file git tracks under src/smalti."""

import subprocess
import sys
import zipfile
from pathlib import Path

tracked = subprocess.run(["git", "ls-files", "src/smalti"], check=True, capture_output=True, text=True).stdout.split()
held = set(zipfile.ZipFile(sys.argv[1]).namelist())
missing = [name for name in tracked if str(Path(name).relative_to("src")) not in held]
if missing:
    sys.exit(f"{sys.argv[1]} lacks {', '.join(missing)}")
print(f"{sys.argv[1]} holds all {len(tracked)} files of the package")
