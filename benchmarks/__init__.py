"""Measurements that verify what they measured."""
