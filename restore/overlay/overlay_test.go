package overlay

import (
	"bytes"
	"errors"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/ckagent/ckagent/agent/image"
	"github.com/ckagent/ckagent/agent/image/fsys"
	"github.com/ckagent/ckagent/agent/image/qcow2"
	"github.com/ckagent/ckagent/agent/problem"
)

const mib = 1 << 20

// qemuIO runs commands of qemu-io on an image.
func qemuIO(t *testing.T, path, format string, commands ...string) {
	t.Helper()
	args := []string{"-f", format, path}
	for _, c := range commands {
		args = append(args, "-c", c)
	}
	out, err := exec.CommandContext(t.Context(), "qemu-io", args...).CombinedOutput()
	if err != nil || strings.Contains(string(out), "failed") {
		t.Fatalf("qemu-io %q: %v: %s", args, err, out)
	}
}

func qemuImg(t *testing.T, args ...string) {
	t.Helper()
	if out, err := exec.CommandContext(t.Context(), "qemu-img", args...).CombinedOutput(); err != nil {
		t.Fatalf("qemu-img %q: %v: %s", args, err, out)
	}
}

// chain makes two volumes, the newer over the older, and the manifest that names them.
func chain(t *testing.T) (dir string, m *image.Manifest) {
	t.Helper()
	dir = t.TempDir()
	const older, newer = "20260101T000000000-00000001-0.qcow2", "20260102T000000000-00000002-0.qcow2"
	qemuImg(t, "create", "-q", "-f", "qcow2", filepath.Join(dir, older), "8M")
	qemuIO(t, filepath.Join(dir, older), "qcow2", "write -P 1 0 2M")
	qemuImg(t, "create", "-q", "-f", "qcow2", "-b", older, "-F", "qcow2", filepath.Join(dir, newer), "8M")
	qemuIO(t, filepath.Join(dir, newer), "qcow2", "write -P 2 1M 2M")
	d := image.Disk{Name: "d", SizeBytes: 8 * mib, Method: image.DiskBackup, Content: image.ContentGuest}
	for _, name := range []string{newer, older} {
		n, sum, err := image.SumFile(t.Context(), fsys.OS{}, filepath.Join(dir, name))
		if err != nil {
			t.Fatal(err)
		}
		d.Volumes = append(d.Volumes, image.Volume{Name: name, Bytes: n, Checksum: sum})
	}
	return dir, &image.Manifest{ID: "20260102T000000000-00000002", Disks: []image.Disk{d}}
}

func TestCheck(t *testing.T) {
	dir, m := chain(t)
	path := func(i int) string { return filepath.Join(dir, m.Disks[0].Volumes[i].Name) }
	sealed := func(i int) bool { return image.Sealed(path(i), m.Disks[0].Volumes[i]) }
	if sealed(0) || sealed(1) {
		t.Fatal("sealed before anybody looked")
	}
	check := func(what, word string) {
		t.Helper()
		err := Check(t.Context(), dir, m)
		if word == "" && err != nil || word != "" && (!problem.Is(err, problem.Integrity) || !strings.Contains(err.Error(), word)) {
			t.Errorf("%s: want %q, got %v", what, word, err)
		}
	}
	check("fresh", "")
	if !sealed(0) || !sealed(1) {
		t.Error("not sealed after they were read")
	}
	check("again", "")

	whole, err := os.ReadFile(path(0))
	if err != nil {
		t.Fatal(err)
	}
	write := func(content []byte) {
		t.Helper()
		if err := os.WriteFile(path(0), content, 0o600); err != nil {
			t.Fatal(err)
		}
	}
	// Written to within the seal's clock tick, or later: either shows.
	changed := bytes.Clone(whole)
	changed[len(changed)-1] ^= 1
	write(changed)
	check("one byte", "checksum")
	write(whole)
	check("put right", "")
	write(append(bytes.Clone(whole), 0))
	check("longer", "bytes")
	other := bytes.Clone(whole)
	copy(other[bytes.Index(other, []byte(m.Disks[0].Volumes[1].Name)):], "2027")
	write(other)
	check("another backing file", "backing file")
	write([]byte("short"))
	check("no image", "bytes")
	write(whole)
	// A copy with all its attributes is another file: it is read, and found right.
	if out, err := exec.CommandContext(t.Context(), "cp", "-a", path(0), path(0)+".copy").CombinedOutput(); err != nil {
		t.Fatalf("%v: %s", err, out)
	}
	if err := os.Rename(path(0)+".copy", path(0)); err != nil {
		t.Fatal(err)
	}
	if sealed(0) {
		t.Error("a copy is taken for what was read")
	}
	check("copied", "")
	// Two volumes in each other's place.
	if err := errors.Join(os.Rename(path(0), path(0)+".x"), os.Rename(path(1), path(0)), os.Rename(path(0)+".x", path(1))); err != nil {
		t.Fatal(err)
	}
	check("swapped", m.ID)
	if err := errors.Join(os.Rename(path(0), path(0)+".x"), os.Rename(path(1), path(0)), os.Rename(path(0)+".x", path(1))); err != nil {
		t.Fatal(err)
	}
	if err := os.Remove(path(1)); err != nil {
		t.Fatal(err)
	}
	check("missing", "no such file")
}

// TestSealForgets: a file written to again within a moment, with its old size.
func TestSealForgets(t *testing.T) {
	path := filepath.Join(t.TempDir(), "v")
	if err := os.WriteFile(path, []byte("abc"), 0o600); err != nil {
		t.Fatal(err)
	}
	v := image.Volume{Name: "v", Bytes: 3, Checksum: 7}
	image.Seal(path, v)
	if !image.Sealed(path, v) {
		t.Fatal("not sealed: no extended attributes here?")
	}
	if v2 := (image.Volume{Name: "v", Bytes: 3, Checksum: 8}); image.Sealed(path, v2) {
		t.Error("sealed for another content")
	}
	later := time.Now().Add(time.Second)
	if err := os.Chtimes(path, later, later); err != nil {
		t.Fatal(err)
	}
	if image.Sealed(path, v) {
		t.Error("still sealed after it was touched")
	}
}

func TestCreate(t *testing.T) {
	dir, m := chain(t)
	top := filepath.Join(dir, m.Disks[0].Volumes[0].Name)
	for name, create := range map[string]func(s Spec) error{
		"overlay": func(s Spec) error { return Create(t.Context(), s) },
		"copy":    func(s Spec) error { return Copy(t.Context(), s) },
	} {
		t.Run(name, func(t *testing.T) {
			s := Spec{Path: filepath.Join(t.TempDir(), "a b,c.qcow2"), Backing: top, Format: "qcow2", SizeBytes: 8 * mib, UID: 1234, GID: 1235}
			if err := create(s); err != nil {
				t.Fatal(err)
			}
			h, err := qcow2.ReadHeader(s.Path)
			if err != nil || h.SizeBytes != 8*mib || (name == "overlay") != (h.Backing == top) {
				t.Errorf("header %+v, %v", h, err)
			}
			st, err := os.Stat(s.Path)
			if err != nil || st.Mode().Perm() != 0o600 {
				t.Errorf("%v %v", st.Mode(), err)
			}
			if same, err := Same(t.Context(), s.Path, "qcow2", top, "qcow2"); err != nil || !same {
				t.Errorf("not the same: %v", err)
			}
			if err := CheckImage(t.Context(), s.Path); err != nil {
				t.Error(err)
			}
			before, err := os.ReadFile(s.Path)
			if err != nil {
				t.Fatal(err)
			}
			if err := create(s); !problem.Is(err, problem.Refused) || !strings.Contains(err.Error(), "--disk-dir") {
				t.Errorf("over an existing file: %v", err)
			}
			if after, err := os.ReadFile(s.Path); err != nil || !bytes.Equal(before, after) {
				t.Errorf("the existing file was changed: %v", err)
			}
			qemuIO(t, s.Path, "qcow2", "read -P 1 0 1M", "read -P 2 1M 2M", "read -P 0 3M 5M", "write -P 3 0 4k")
			if same, err := Same(t.Context(), s.Path, "qcow2", top, "qcow2"); err != nil || same {
				t.Errorf("the same after a write: %v", err)
			}
		})
	}
	bad := Spec{Path: filepath.Join(t.TempDir(), "x"), Backing: "/nowhere", Format: "qcow2"}
	if err := Copy(t.Context(), bad); err == nil || !strings.Contains(err.Error(), "/nowhere") {
		t.Errorf("a copy of nothing: %v", err)
	}
	if _, err := os.Stat(bad.Path); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("left behind: %v", err)
	}
	if _, err := Same(t.Context(), "/nowhere", "raw", top, "qcow2"); err == nil {
		t.Error("compared with nothing")
	}
	// Metadata that is broken is found: an L1 entry that points nowhere.
	img, err := os.ReadFile(top)
	if err != nil {
		t.Fatal(err)
	}
	harmed := filepath.Join(dir, "harmed")
	if err := os.WriteFile(harmed, bytes.ReplaceAll(img, []byte{0x80, 0, 0, 0, 0, 4, 0, 0}, []byte{0x80, 0, 0, 0, 0x7f, 4, 0, 0}), 0o600); err != nil {
		t.Fatal(err)
	}
	if err := CheckImage(t.Context(), harmed); !problem.Is(err, problem.Integrity) {
		t.Errorf("broken metadata: %v", err)
	}
}
