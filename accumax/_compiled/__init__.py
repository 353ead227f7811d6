"""What did the compiler do?"""
