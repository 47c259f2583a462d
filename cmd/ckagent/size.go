package main

import (
	"fmt"
	"math"
	"strconv"
	"strings"
)

// sizeValue is a flag that takes a byte count with an optional K, M, G or T
// (powers of 1024).
type sizeValue uint64

func (v *sizeValue) String() string {
	if *v == 0 {
		return ""
	}
	return sizeText(uint64(*v))
}

func (v *sizeValue) Type() string { return "SIZE" }

func (v *sizeValue) Set(s string) error {
	number, unit := strings.ToUpper(strings.TrimSpace(s)), uint64(1)
	number = strings.TrimSuffix(strings.TrimSuffix(number, "B"), "I")
	if n := len(number); n > 0 {
		if i := strings.IndexByte("KMGT", number[n-1]); i >= 0 {
			number, unit = number[:n-1], 1<<(10*(i+1))
		}
	}
	n, err := strconv.ParseUint(number, 10, 64)
	if err != nil || n > math.MaxInt64/unit {
		return fmt.Errorf("%q is no size; 512M or 2G are", s)
	}
	*v = sizeValue(n * unit)
	return nil
}
