"""What ``mesh bench`` measures, and the plugin that adds the command. Uses the product as a host program would.

What only those who make the product measure lies in ``benchmarks/`` of the repository. Nothing else imports this.
"""
