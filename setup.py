"""Four packages, one distribution. Each package sits in its room and keeps a name that is safe to import."""

from setuptools import find_packages, setup

ROOM_OF = {
    "ditq_kernels": "kernels",
    "ditq_runtime": ".",
    "ditq_converters": "converters",
    "ditq_bench": "bench",
}

setup(
    packages=[
        package
        for name, room in ROOM_OF.items()
        for package in find_packages(room, include=[name, f"{name}.*"])
    ],
    package_dir={name: f"{room}/{name}" for name, room in ROOM_OF.items()},
    package_data={
        "ditq_kernels": ["py.typed", "tuned/*.json", "_triton/offline/*.c"],
        "ditq_runtime": ["py.typed"],
        "ditq_converters": ["py.typed", "demo/assets/*"],
        "ditq_bench": ["py.typed", "census/*.json"],
    },
)
