package uffd

import (
	"bytes"
	"errors"
	"os"
	"path/filepath"
	"testing"

	"golang.org/x/sys/unix"
)

func TestAdoptRefusesUnknownFeatures(t *testing.T) {
	f, err := New(unix.O_CLOEXEC)
	if err != nil {
		t.Fatal(err)
	}
	_, err = Adopt(f, 1<<40|FeatureThreadID)
	if !errors.Is(err, ErrUnsupported) || !bytes.Contains([]byte(err.Error()), []byte("bit40")) {
		t.Fatalf("%v", err)
	}
	r, w, err := os.Pipe()
	if err != nil {
		t.Fatal(err)
	}
	defer w.Close()
	if _, err := Adopt(r, 0); !errors.Is(err, ErrUnsupported) {
		t.Fatalf("a pipe was adopted: %v", err)
	}
	if _, err := r.Stat(); err == nil {
		t.Error("the file was not closed")
	}
}

func TestRegisterExplains(t *testing.T) {
	h := open(t, FeaturePagefaultFlagWP|FeatureWPHugetlbfsShmem)
	dir := t.TempDir()
	var st unix.Statfs_t
	if err := unix.Statfs(dir, &st); err != nil {
		t.Fatal(err)
	}
	f, err := os.Create(filepath.Join(dir, "ram"))
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	if err := f.Truncate(4 * page); err != nil {
		t.Fatal(err)
	}
	if st.Type == unix.TMPFS_MAGIC {
		t.Log("temporary directory is tmpfs: the disk file case cannot be seen here")
	} else {
		m := newMemory(t, int(f.Fd()), 4*page, unix.MAP_PRIVATE)
		_, err = h.Register(m.addr(), m.len(), ModeWP)
		if !errors.Is(err, ErrUnsupported) || !errors.Is(err, unix.EINVAL) || !bytes.Contains([]byte(err.Error()), []byte("disk filesystem")) {
			t.Errorf("private file: %v", err)
		}
	}

	m := anonymous(t, 4*page)
	if _, err := h.Register(m.addr(), 1, ModeWP); !errors.Is(err, unix.EINVAL) || errors.Is(err, ErrUnsupported) {
		t.Errorf("unaligned: %v", err)
	}
	if err := h.WriteProtect(m.addr(), page); !errors.Is(err, unix.ENOENT) {
		t.Errorf("arming what is not registered: %v", err)
	}
	if _, err := h.Register(m.addr(), m.len(), ModeWP); err != nil {
		t.Fatal(err)
	}
	other := open(t, FeaturePagefaultFlagWP)
	if _, err := other.Register(m.addr(), m.len(), ModeWP); !errors.Is(err, unix.EBUSY) {
		t.Errorf("two owners: %v", err)
	}
}

func TestFeatureNames(t *testing.T) {
	if got := (FeatureWPAsync | FeaturePagefaultFlagWP | 1<<50).String(); got != "PAGEFAULT_FLAG_WP,WP_ASYNC,bit50" {
		t.Error(got)
	}
	if Features(0).String() != "none" || Mode(0).String() != "0x0" || (ModeWP|ModeMinor).String() != "wp|minor" {
		t.Error("names")
	}
	f, err := Probe()
	if err != nil {
		t.Fatal(err)
	}
	if !f.Has(FeatureMissingShmem) {
		t.Errorf("probe: %v", f)
	}
	t.Logf("kernel features: %v", f)
}

func FuzzParseInfo(f *testing.F) {
	f.Add([]byte("pos:\t0\npending:\t1\ntotal:\t2\nAPI:\taa:80000001:8000000000000003\n"))
	f.Add([]byte("API:\taa:1\n"))
	f.Fuzz(func(t *testing.T, b []byte) {
		in, err := parseInfo(b)
		if err != nil && in != (Info{}) {
			t.Error("both an error and a result")
		}
	})
}
