"""Labels by people: one more judge, who reads responses in a browser (paper D.1's manual validation)."""
