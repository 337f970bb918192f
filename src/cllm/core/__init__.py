"""Ground floor: configuration objects, errors, machine facts. Imports nothing of the house."""
