package qcow2

import (
	"bytes"
	"errors"
	"os"
	"os/exec"
	"path/filepath"
	"testing"

	"go.uber.org/goleak"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// TestReadHeader reads what qemu-img writes.
func TestReadHeader(t *testing.T) {
	dir := t.TempDir()
	for _, c := range []struct {
		args []string
		want Header
	}{
		{[]string{"-f", "qcow2", "a", "8M"}, Header{SizeBytes: 8 << 20}},
		{[]string{"-f", "qcow2", "-o", "compat=0.10", "b", "3T"}, Header{SizeBytes: 3 << 40}},
		{[]string{"-f", "qcow2", "-b", "a", "-F", "qcow2", "c", "16M"}, Header{SizeBytes: 16 << 20, Backing: "a"}},
		{[]string{"-f", "qcow2", "-o", "cluster_size=2M,extended_l2=on", "-u", "-b", "/some/where else", "-F", "raw", "d", "1M"}, Header{SizeBytes: 1 << 20, Backing: "/some/where else"}},
	} {
		cmd := exec.CommandContext(t.Context(), "qemu-img", append([]string{"create", "-q"}, c.args...)...)
		cmd.Dir = dir
		if out, err := cmd.CombinedOutput(); err != nil {
			t.Fatalf("%q: %v: %s", c.args, err, out)
		}
		name := c.args[len(c.args)-2]
		if h, err := ReadHeader(filepath.Join(dir, name)); err != nil || h != c.want {
			t.Errorf("%s: %+v, %v; want %+v", name, h, err, c.want)
		}
	}
	for name, content := range map[string]string{"empty": "", "short": "QFI\xfb", "zeros": string(make([]byte, 512))} {
		if err := os.WriteFile(filepath.Join(dir, name), []byte(content), 0o600); err != nil {
			t.Fatal(err)
		}
		if _, err := ReadHeader(filepath.Join(dir, name)); !errors.Is(err, ErrFormat) {
			t.Errorf("%s: %v", name, err)
		}
	}
	if _, err := ReadHeader(filepath.Join(dir, "missing")); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("missing: %v", err)
	}
}

func FuzzHeader(f *testing.F) {
	var b [headerBytes + 16]byte
	copy(b[:], "QFI\xfb\x00\x00\x00\x03\x00\x00\x00\x00\x00\x00\x00\x48\x00\x00\x00\x05")
	copy(b[headerBytes:], "below")
	f.Add(b[:])
	f.Add([]byte("QFI\xfb"))
	f.Fuzz(func(t *testing.T, data []byte) {
		h, err := parseHeader(bytes.NewReader(data))
		if err == nil && (len(h.Backing) > maxBacking || h.Backing != "" && !bytes.Contains(data, []byte(h.Backing))) {
			t.Fatalf("%+v", h)
		}
	})
}
