"""How many pages a KV cache has, and whether there is memory for them."""

import os

import torch

# Tokens that a row is given room for beside its new ones, where nothing is known of the prompts.
PROMPT_TOKENS = 1024

# Of the memory that is free: what a cache may take unasked.
SHARE = 0.8


def free_memory(device: torch.device) -> int:
    """Bytes that can be had on the device."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    with open("/proc/meminfo") as lines:
        for line in lines:
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def pages_for(
    asked: int | None, page_bytes: int, free: int, batch_size: int, context: int, max_new_tokens: int, block_size: int
) -> int:
    """Pages of the cache: as many as were asked for, else room for each row, and for one row as long as can be.

    Raises ValueError where they do not fit into the free memory.
    """
    if asked is not None:
        if asked * page_bytes > free:
            most, size = (f"{count / 2**30:.1f} GiB" for count in (free, asked * page_bytes))
            raise ValueError(f"--num-pages: expected a KV cache of at most {most}, got {asked} pages, {size}")
        return asked
    tokens = max(context, batch_size * min(context, PROMPT_TOKENS + max_new_tokens))
    pages = min(-(-tokens // block_size), int(SHARE * free) // page_bytes)
    if pages < 1:
        raise ValueError(f"--block-size: no memory for a page of the KV cache, {page_bytes / 2**20:.0f} MiB")
    return pages
