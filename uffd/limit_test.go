package uffd_test

import (
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
)

// TestLimitProgram builds tools/bench/cwp and has it serve a few faults in every way.
func TestLimitProgram(t *testing.T) {
	gcc, err := exec.LookPath("gcc")
	if err != nil {
		t.Skip("no gcc on this machine")
	}
	bin := filepath.Join(t.TempDir(), "cwp")
	if out, err := exec.Command(gcc, "-O2", "-Wall", "-Wextra", "-Werror", "-o", bin, "../tools/bench/cwp/cwp.c").CombinedOutput(); err != nil {
		t.Fatalf("%v\n%s", err, out)
	}
	for _, kind := range []string{"write", "missing"} {
		for _, way := range []string{"poll", "block", "spin"} {
			out, err := exec.CommandContext(t.Context(), bin, "-k", kind, "-w", way, "-n", "300", "-x", "-r", "2").CombinedOutput()
			if err != nil {
				t.Fatalf("%s %s: %v\n%s", kind, way, err, out)
			}
			if lines := strings.Split(strings.TrimSpace(string(out)), "\n"); len(lines) != 2 || !strings.Contains(lines[1], "faults=300 median_ns=") {
				t.Errorf("%s %s: %s", kind, way, out)
			}
		}
	}
	if out, err := exec.Command(bin, "-n", "0").CombinedOutput(); err == nil {
		t.Errorf("no pages: %s", out)
	}
}
