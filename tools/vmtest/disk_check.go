package vmtest

import (
	"context"
	"fmt"
	"os"
	"path/filepath"
	"testing"
)

// CheckLog boots a machine that only looks at a disk: it mounts it, which replays
// the file system's journal as after a power failure, reads the whole log, says
// what is there and ends. The image is written to by that; give it a copy.
func CheckLog(t testing.TB, d Disk) LogCheck {
	t.Helper()
	v := Start(t, Config{MemoryMiB: 128, Disks: []Disk{d}, Append: "GD_LOGCHECK=1", NoWait: true})
	ctx, cancel := context.WithTimeout(t.Context(), defaultTimeout)
	defer cancel()
	if _, err := v.AwaitSerial(ctx, `^LOGCHECK `); err != nil {
		t.Fatalf("vmtest: %v\nconsole:\n%s", err, lastLines(v.Serial(), 20))
	}
	select {
	case <-v.Done(): // it unmounts and powers off
	case <-ctx.Done():
		t.Fatalf("vmtest: the machine that looked at %s does not end\n%s", d.Path, lastLines(v.Serial(), 20))
	}
	r := v.Invariants()
	v.Kill()
	if r.LogCheck == nil {
		t.Fatalf("vmtest: no report on %s\n%s", d.Path, lastLines(v.Serial(), 20))
	}
	return *r.LogCheck
}

// CheckFS runs the file system's own check on an image whose journal is replayed
// (CheckLog does it). It changes nothing.
func CheckFS(ctx context.Context, d Disk) error {
	raw := d.Path
	if d.Format != "raw" {
		raw = filepath.Join(filepath.Dir(d.Path), ".check.raw")
		defer os.Remove(raw)
		if err := runTool(ctx, "qemu-img", "convert", "-f", d.Format, "-O", "raw", d.Path, raw); err != nil {
			return err
		}
	}
	switch d.FS {
	case "ext4":
		return runTool(ctx, "e2fsck", "-fn", raw)
	case "xfs":
		return runTool(ctx, "xfs_repair", "-n", "-f", raw)
	}
	return fmt.Errorf("no check for file system %q", d.FS)
}
