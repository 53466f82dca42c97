"""What ``mesh bench`` measures. Uses the product as a host program would; nothing else imports this package."""
