"""Programs that draw, as hosts: diffusers pipelines, and what a ComfyUI node pack builds on."""
