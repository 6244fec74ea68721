"""Writes data.parquet: 240 short conversations about units, made for the quickstart. Needs pyarrow.

    python make_data.py
"""
import random
import pyarrow as pa
import pyarrow.parquet as pq

random.seed(7)
UNITS = [("hours", "minutes", 60), ("minutes", "seconds", 60), ("days", "hours", 24), ("weeks", "days", 7),
         ("metres", "centimetres", 100), ("kilometres", "metres", 1000), ("kilograms", "grams", 1000),
         ("dozens", "pieces", 12)]
rows = []
for i in range(240):
    big, small, factor = UNITS[i % len(UNITS)]
    n = random.randint(2, 9)
    rows.append([{"role": "user", "content": f"How many {small} are {n} {big}?"},
                 {"role": "assistant", "content": f"{n} {big} are {n * factor} {small}."}])
kind = pa.list_(pa.struct([("role", pa.string()), ("content", pa.string())]))
pq.write_table(pa.table({"messages": pa.array(rows, kind)}), "data.parquet", compression="zstd")
