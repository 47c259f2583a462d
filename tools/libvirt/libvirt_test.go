package libvirt

import (
	"bytes"
	"context"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"testing"
	"time"

	"go.uber.org/goleak"
	"golang.org/x/sys/unix"

	"github.com/ckagent/ckagent/tools/guest"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// limit is for a story on a machine that is busy with other things.
const limit = 6 * time.Minute

// story runs a script with a release binary and the guest at hand.
func story(t *testing.T, name string) {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), limit)
	defer cancel()
	// Not t.TempDir, which another user's QEMU could not pass through.
	dir, err := os.MkdirTemp("", "ckagent-libvirt-")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	binary := filepath.Join(dir, "ckagent")
	build := exec.CommandContext(ctx, "go", "build", "-trimpath", "-o", binary, "github.com/ckagent/ckagent/cmd/ckagent")
	if out, err := build.CombinedOutput(); err != nil {
		t.Fatalf("build: %v\n%s", err, out)
	}
	image, err := guest.Linux(ctx)
	if err != nil {
		t.Fatal(err)
	}
	for name, path := range map[string]string{"vmlinux": image.Kernel, "initrd": image.Initrd} {
		if err := os.Symlink(path, filepath.Join(dir, name)); err != nil {
			t.Fatal(err)
		}
	}
	lab := filepath.Join(dir, "lab")
	if err := os.Mkdir(lab, 0o755); err != nil {
		t.Fatal(err)
	}
	if err := os.Chmod(dir, 0o755); err != nil {
		t.Fatal(err)
	}
	script, err := filepath.Abs(name)
	if err != nil {
		t.Fatal(err)
	}
	cmd := exec.CommandContext(ctx, script)
	cmd.Env = append(os.Environ(), "CKAGENT="+binary, "GUEST="+dir, "LAB="+lab, "LC_ALL=C")
	// To unshare in the end, which takes the namespace with it.
	cmd.SysProcAttr = &unix.SysProcAttr{Setpgid: true}
	cmd.Cancel = func() error { return unix.Kill(-cmd.Process.Pid, unix.SIGTERM) }
	cmd.WaitDelay = 10 * time.Second
	var out bytes.Buffer
	cmd.Stdout, cmd.Stderr = &out, &out
	err = cmd.Run()
	t.Logf("%s", out.Bytes())
	if err != nil {
		t.Fatalf("%s: %v", name, err)
	}
	for _, left := range []string{binary, "/usr/sbin/libvirtd"} {
		if pids := running(t, left, lab); len(pids) > 0 {
			t.Errorf("%s still runs: %v", left, pids)
		}
	}
}

// running lists processes of a program that have to do with a directory.
func running(t *testing.T, program, dir string) (pids []string) {
	t.Helper()
	exes, err := filepath.Glob("/proc/[0-9]*/exe")
	if err != nil {
		t.Fatal(err)
	}
	for _, exe := range exes {
		if path, err := os.Readlink(exe); err != nil || path != program {
			continue // another one, or gone
		}
		env, _ := os.ReadFile(filepath.Join(filepath.Dir(exe), "environ")) // empty if it is gone
		if bytes.Contains(env, fmt.Appendf(nil, "LAB=%s\x00", dir)) {
			pids = append(pids, filepath.Base(filepath.Dir(exe)))
		}
	}
	return pids
}

func TestStory(t *testing.T) { story(t, "story.sh") }

func TestManners(t *testing.T) { story(t, "manners.sh") }
