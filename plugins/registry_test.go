package plugins

import (
	"bytes"
	"errors"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"

	"github.com/ckagent/ckagent/agent/problem"
)

func executable(t testing.TB, name, content string) string {
	t.Helper()
	path := filepath.Join(t.TempDir(), name)
	if err := os.WriteFile(path, []byte(content), 0o755); err != nil {
		t.Fatal(err)
	}
	return path
}

func TestInstall(t *testing.T) {
	r := NewRegistry(filepath.Join(t.TempDir(), "policies"))
	if list, err := r.List(); err != nil || list != nil {
		t.Errorf("nothing is installed: %v, %v", list, err)
	}
	if _, err := r.Lookup("auto"); !problem.Is(err, problem.NotFound) {
		t.Errorf("%v", err)
	}
	first, err := r.Install(executable(t, "ckagent-policy-auto", "#!/bin/sh\n"))
	if err != nil || first.Name != "auto" {
		t.Fatal(first, err)
	}
	if _, err := r.Install(executable(t, "every_hour.py", "#!/usr/bin/python3\n")); err != nil {
		t.Fatal(err)
	}
	second, err := r.Install(executable(t, "ckagent-policy-auto", "#!/bin/sh\nexit 1\n"))
	if err != nil || second.SHA256 == first.SHA256 {
		t.Fatal(second, err)
	}
	for _, ref := range []string{"auto", second.Path} {
		if p, err := r.Lookup(ref); err != nil || p != second {
			t.Errorf("%s: %v, %v", ref, p, err)
		}
	}
	list, err := r.List()
	if err != nil || len(list) != 2 || list[1].Name != "every_hour" {
		t.Errorf("%v, %v", list, err)
	}
	if files, _ := filepath.Glob(filepath.Join(r.Dir(), ".*")); len(files) != 0 {
		t.Errorf("left on the way: %v", files)
	}
	for _, bad := range []string{"/dev/null", t.TempDir(), filepath.Join(t.TempDir(), "none"), executable(t, "Bad Name", "")} {
		if _, err := r.Install(bad); err == nil {
			t.Errorf("%s is installed", bad)
		}
	}
}

// TestOnlyRootWrites: nothing is run that somebody else could have put there, or that
// is not what was installed.
func TestOnlyRootWrites(t *testing.T) {
	for what, harm := range map[string]func(dir, path string) error{
		"the directory is another's": func(dir, _ string) error { return os.Chown(dir, 1234, 0) },
		"the directory is open":      func(dir, _ string) error { return os.Chmod(dir, 0o777|os.ModeSticky) },
		"its group may write":        func(dir, _ string) error { return os.Chmod(dir, 0o775) },
		"the way is another's":       func(dir, _ string) error { return os.Chown(filepath.Dir(dir), 1234, 0) },
		"the way is open":            func(dir, _ string) error { return os.Chmod(filepath.Dir(dir), 0o777) },
		"the program is another's":   func(_, path string) error { return os.Chown(path, 1234, 0) },
		"the program can be written": func(_, path string) error { return os.Chmod(path, 0o757) },
		"the program is another":     func(_, path string) error { return os.WriteFile(path, []byte("#!/bin/sh\nid\n"), 0o755) },
		"the program is a link":      func(_, path string) error { return errors.Join(os.Remove(path), os.Symlink("/bin/sh", path)) },
		"the checksum is gone":       func(_, path string) error { return os.Remove(path + sumSuffix) },
		"the checksum is none":       func(_, path string) error { return os.WriteFile(path+sumSuffix, []byte("x\n"), 0o644) },
		"the checksum is of something": func(_, path string) error {
			return os.WriteFile(path+sumSuffix, []byte(strings.Repeat("ab", 32)+"\n"), 0o644)
		},
	} {
		top := t.TempDir()
		r := NewRegistry(filepath.Join(top, "way", "policies"))
		p, err := r.Install(executable(t, "auto", "#!/bin/sh\n"))
		if err != nil {
			t.Fatal(err)
		}
		if err := harm(r.Dir(), p.Path); err != nil {
			t.Fatal(err)
		}
		if got, err := r.Lookup("auto"); !problem.Is(err, problem.Refused) && !problem.Is(err, problem.Integrity) {
			t.Errorf("%s: %v, %v", what, got, err)
		}
		if list, err := r.List(); err == nil || len(list) > 0 {
			t.Errorf("%s: listed: %v, %v", what, list, err)
		}
	}
}

// TestPathsOutside: a program that is not in the directory is not run, whatever leads
// to it.
func TestPathsOutside(t *testing.T) {
	r := NewRegistry(filepath.Join(t.TempDir(), "policies"))
	p, err := r.Install(executable(t, "auto", "#!/bin/sh\n"))
	if err != nil {
		t.Fatal(err)
	}
	outside := executable(t, "auto", "#!/bin/sh\n")
	link := filepath.Join(filepath.Dir(p.Path), "link")
	if err := os.Symlink(outside, link); err != nil {
		t.Fatal(err)
	}
	for _, ref := range []string{outside, link, r.Dir() + "/../auto", "../auto", "", ".", "auto.sha256", "AUTO"} {
		if got, err := r.Lookup(ref); err == nil {
			t.Errorf("%q is %v", ref, got)
		}
	}
}

// TestInstallWhileItIsUsed: whoever looks sees the old program or the new one.
func TestInstallWhileItIsUsed(t *testing.T) {
	r := NewRegistry(filepath.Join(t.TempDir(), "policies"))
	paths := []string{executable(t, "auto", "#!/bin/sh\n"), executable(t, "auto", "#!/bin/bash\n")}
	if _, err := r.Install(paths[0]); err != nil {
		t.Fatal(err)
	}
	var wg sync.WaitGroup
	stop := make(chan struct{})
	wg.Go(func() {
		for {
			select {
			case <-stop:
				return
			default:
			}
			if _, err := r.Lookup("auto"); err != nil {
				t.Error(err)
				return
			}
		}
	})
	for i := range 50 {
		if _, err := r.Install(paths[i%2]); err != nil {
			t.Fatal(err)
		}
	}
	close(stop)
	wg.Wait()
}

func FuzzSums(f *testing.F) {
	f.Add([]byte(strings.Repeat("ab", 32) + "  auto\n"))
	f.Add([]byte("\n"))
	f.Fuzz(func(t *testing.T, b []byte) {
		sums, err := parseSums(bytes.NewReader(b))
		if (err == nil) != (len(sums) > 0) {
			t.Errorf("%q, %v", sums, err)
		}
		for _, s := range sums {
			if len(s) != 64 || strings.ToLower(s) != s {
				t.Errorf("%q", s)
			}
		}
	})
}
