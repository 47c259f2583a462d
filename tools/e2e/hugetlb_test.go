package e2e

import (
	"os"
	"path/filepath"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/ckagent/ckagent/tools/vmtest"
)

// TestHugetlb: RAM in huge pages of 2 MiB that the host has reserved, of which the guest
// writes single words all the time: each checkpoint is copied while it runs, and a
// restore has it, in ordinary memory.
func TestHugetlb(t *testing.T) {
	if testing.Short() {
		vmtest.Skip(t, "short", "boots a guest")
	}
	if missing := vmtest.HugePages(t, 2048, 64); missing != "" {
		vmtest.Skip(t, "hugetlb", "%s", missing)
	}
	dir := filepath.Join(t.TempDir(), "hugetlbfs")
	if err := os.Mkdir(dir, 0o755); err != nil {
		t.Fatal(err)
	}
	if err := unix.Mount("hugetlbfs", dir, "hugetlbfs", 0, "pagesize=2M"); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = unix.Unmount(dir, unix.MNT_DETACH) }) // whatever the last QEMU does
	for name, backend := range map[string]string{
		"memfd":        "memory-backend-memfd,id=ram0,size=96M,hugetlb=on,hugetlbsize=2M,prealloc=on",
		"private file": "memory-backend-file,id=ram0,size=96M,mem-path=" + dir,
		"shared file":  "memory-backend-file,id=ram0,size=96M,share=on,mem-path=" + dir,
	} {
		t.Run(name, func(t *testing.T) {
			x := newTool(t)
			v := vmtest.Start(t, vmtest.Config{Guest: vmtest.Mini, MemoryMiB: 96, WSMiB: 24, Rate: 4000,
				Args: []string{"-object", backend, "-machine", "memory-backend=ram0"}})
			var ids []string
			for range 2 {
				v.WaitProgress(t, 400)
				c := x.checkpoint(t, v.PID(), "--mode", "cow", "--keep-last", "0")
				if c.Mode != "cow" || c.Engine != "uffd" || c.CapturedPages == 0 || c.CapturedPages%512 != 0 {
					t.Errorf("%+v", c)
				}
				wantUntouched(t, v.PID())
				ids = append(ids, c.ID)
			}
			v.Invariants()
			if err := v.Crash(); err != nil {
				t.Fatal(err)
			}
			for _, id := range ids {
				r, w := x.restore(t, id, v.SerialPath())
				w.WaitProgress(t, 400)
				x.wantDrained(t, r, w, false)
				w.Invariants()
				w.Kill()
				removeLater(r)
			}
		})
	}
}
