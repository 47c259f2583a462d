package vmtest

import (
	"fmt"
	"os"
	"strconv"
	"strings"
	"testing"
)

// HugePages reserves huge pages of a size in KiB beyond those that the host has free, and
// gives them back when the test ends. If that cannot be, it says why.
func HugePages(t testing.TB, kib, pages int) (missing string) {
	t.Helper()
	dir := fmt.Sprintf("/sys/kernel/mm/hugepages/hugepages-%dkB/", kib)
	read := func(name string) int {
		raw, err := os.ReadFile(dir + name)
		if err != nil {
			return -1
		}
		n, _ := strconv.Atoi(strings.TrimSpace(string(raw))) // the kernel's own number
		return n
	}
	have := read("nr_hugepages")
	if have < 0 {
		return fmt.Sprintf("no huge pages of %d KiB", kib)
	}
	add := func(n int) error {
		return os.WriteFile(dir+"nr_hugepages", []byte(strconv.Itoa(max(0, read("nr_hugepages")+n))), 0o644)
	}
	err := add(pages)
	// Others may reserve some at the same time: what is added here is taken away again.
	if got := read("nr_hugepages") - have; got > 0 {
		t.Cleanup(func() {
			if err := add(-min(got, pages)); err != nil {
				t.Error(err)
			}
		})
	}
	if err != nil || read("free_hugepages") < pages {
		return fmt.Sprintf("no memory for %d huge pages of %d KiB", pages, kib)
	}
	return ""
}
