package plugins

import (
	"os"
	"os/exec"
	"path/filepath"
	"sync"
	"testing"
)

// Directories of the dead are taken away; those in use, those of others and what only
// looks like one are not.
func TestSweep(t *testing.T) {
	in := t.TempDir()
	held, err := newSocketDir(in)
	if err != nil {
		t.Fatal(err)
	}
	left := filepath.Join(in, socketPrefix+"left")
	if err := os.MkdirAll(filepath.Join(left, "plugin-dir1"), 0o700); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(filepath.Join(left, "plugin-dir1", "plugin"), nil, 0o600); err != nil {
		t.Fatal(err)
	}
	elsewhere := t.TempDir()
	link, others, other := filepath.Join(in, socketPrefix+"link"), filepath.Join(in, socketPrefix+"others"), filepath.Join(in, "ckagent-policy-1")
	for _, err := range []error{os.Symlink(elsewhere, link), os.Mkdir(others, 0o700), os.Chown(others, 65534, 65534), os.Mkdir(other, 0o700)} {
		if err != nil {
			t.Fatal(err)
		}
	}
	sweepSocketDirs(in)
	for path, want := range map[string]bool{held.path: true, left: false, link: true, elsewhere: true, others: true, other: true} {
		if _, err := os.Lstat(path); (err == nil) != want {
			t.Errorf("%s: %v", path, err)
		}
	}
	if err := held.remove(); err != nil {
		t.Error(err)
	}
	if _, err := os.Lstat(held.path); !os.IsNotExist(err) {
		t.Errorf("%v", err)
	}
}

// A directory that was made is there until it is given back, however much is swept.
func TestSweepAgainstMaking(t *testing.T) {
	in := t.TempDir()
	stop := make(chan struct{})
	var sweepers, makers sync.WaitGroup
	for range 2 {
		sweepers.Go(func() {
			for {
				select {
				case <-stop:
					return
				default:
					sweepSocketDirs(in)
				}
			}
		})
	}
	for range 4 {
		makers.Go(func() {
			for range 200 {
				d, err := newSocketDir(in)
				if err != nil {
					t.Error(err)
					return
				}
				if err := os.WriteFile(filepath.Join(d.path, "plugin"), nil, 0o600); err != nil {
					t.Errorf("it was swept while in use: %v", err)
				}
				if err := d.remove(); err != nil {
					t.Error(err)
				}
			}
		})
	}
	makers.Wait()
	close(stop)
	sweepers.Wait()
	if left, err := os.ReadDir(in); err != nil || len(left) > 0 {
		t.Errorf("left: %v %v", left, err)
	}
}

// hostVariable has the test binary be a host that starts the program it names, and waits.
const hostVariable = "CKAGENT_TEST_HOST"

// A host that is killed leaves its directory, and the next one takes it away.
func TestHostIsKilled(t *testing.T) {
	r := registry(t, "steady")
	in := shortDir(t)
	c := exec.Command(os.Args[0], in)
	c.Env = append(os.Environ(), hostVariable+"="+r.Dir())
	c.Stderr = os.Stderr
	out, err := c.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := c.Start(); err != nil {
		t.Fatal(err)
	}
	if _, err := out.Read(make([]byte, 1)); err != nil {
		t.Error(err)
	}
	_ = c.Process.Kill()
	_ = c.Wait() // killed
	if left, _ := filepath.Glob(filepath.Join(in, socketPrefix+"*")); len(left) != 1 {
		t.Fatalf("a killed host leaves %v: nothing is tested", left)
	}
	p, err := r.Lookup("steady")
	if err != nil {
		t.Fatal(err)
	}
	h := &Host{TempDir: in}
	g, err := h.Start(t.Context(), p, nil)
	if err != nil {
		t.Fatal(err)
	}
	if left, _ := filepath.Glob(filepath.Join(in, socketPrefix+"*")); len(left) != 1 || left[0] != g.dir.path {
		t.Errorf("%v, want %s alone", left, g.dir.path)
	}
	g.End()
	if left, _ := os.ReadDir(in); len(left) > 0 {
		t.Errorf("left: %v", left)
	}
}
