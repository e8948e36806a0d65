"""Our packs against the published algorithm, step by step. Mirrors no module: the other side is
`published.py`, written from the paper and the scripts' equations, with diffusers' and PEFT's parts.
"""
