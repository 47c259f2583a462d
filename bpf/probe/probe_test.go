package probe

import (
	"bytes"
	"context"
	"errors"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"go.uber.org/goleak"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// TestAll runs the probes for real. What works depends on the kernel; what must
// hold on every one is that the results are consistent with each other.
func TestAll(t *testing.T) {
	byName := map[string]Result{}
	for _, r := range All(t.Context()) {
		t.Logf("%-24s ok=%-5v %s", r.Name, r.OK, r.Detail)
		byName[r.Name] = r
		if r.Detail == "" {
			t.Errorf("%s: no detail", r.Name)
		}
		if r.OK != (r.Err == nil) || r.OK != (r.Costs == "") || r.OK != (r.Mend == "") {
			t.Errorf("%s: inconsistent %+v", r.Name, r)
		}
		if strings.ContainsAny(r.Detail, "\n\r") {
			t.Errorf("%s: detail has several lines", r.Name)
		}
	}
	if len(byName) != len(Names()) {
		t.Errorf("%d results for %d names", len(byName), len(Names()))
	}
	if !byName["capabilities"].OK {
		for n, r := range byName {
			if r.OK && n != "btf" && n != "capabilities" {
				t.Errorf("%s works without capabilities", n)
			}
		}
		return
	}
	// A kernel that has BTF and takes our programs has had ring buffers for
	// longer: if that fails, our object is at fault.
	if byName["btf"].OK && !byName["ring_buffer"].OK {
		t.Error("ring buffer:", byName["ring_buffer"].Err)
	}
}

func TestCancelled(t *testing.T) {
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	for _, r := range All(ctx) {
		if r.OK || !errors.Is(r.Err, context.Canceled) {
			t.Errorf("%+v", r)
		}
	}
}

// TestObjectIsCurrent builds the object from its source elsewhere and compares:
// the committed one must be what clang makes of it, wherever the tree lies.
func TestObjectIsCurrent(t *testing.T) {
	out, err := exec.Command("clang", "--version").Output()
	if err != nil {
		t.Skip("no clang on this machine: the committed object cannot be rebuilt")
	}
	if !bytes.Contains(out, []byte("clang version 14.")) {
		t.Skip("clang is not version 14, whose output is committed")
	}
	if testing.Short() {
		t.Skip("short run: objects are not rebuilt")
	}
	// bpf2go must run inside the module; only its output goes elsewhere.
	dir := t.TempDir()
	src, err := os.ReadFile("generate.go")
	if err != nil {
		t.Fatal(err)
	}
	for _, want := range []string{"-mcpu=v3", "-target amd64", "-nostdinc"} {
		if !bytes.Contains(src, []byte(want)) {
			t.Errorf("generate.go lacks %s", want)
		}
	}
	here, err := os.Getwd()
	if err != nil {
		t.Fatal(err)
	}
	cmd := exec.Command("go", "run", "github.com/cilium/ebpf/cmd/bpf2go", "-output-dir", dir, "-go-package", "probe",
		"-target", "amd64", "-no-global-types",
		"-cflags", "-O2 -g -Wall -Werror -Wno-unused-variable -mcpu=v3 -nostdinc -I../headers", "objects", filepath.Join(here, "probe.bpf.c"))
	if out, err := cmd.CombinedOutput(); err != nil {
		t.Fatalf("%v\n%s", err, out)
	}
	for _, name := range []string{"objects_x86_bpfel.o", "objects_x86_bpfel.go"} {
		got, err := os.ReadFile(filepath.Join(dir, name))
		if err != nil {
			t.Fatal(err)
		}
		want, err := os.ReadFile(name)
		if err != nil {
			t.Fatal(err)
		}
		if !bytes.Equal(got, want) {
			t.Errorf("%s is stale or not reproducible: run go generate ./bpf/...", name)
		}
	}
}
