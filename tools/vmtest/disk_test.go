package vmtest

import (
	"bytes"
	"context"
	"os"
	"testing"
	"time"
)

// TestDiskLog: after a power failure the disk holds what was said to be safe. The
// other file systems, buses and formats are tools/e2e's.
func TestDiskLog(t *testing.T) {
	v := Start(t, Config{MemoryMiB: 192, Disks: []Disk{{FS: "xfs", Bus: "virtio-scsi", Format: "qcow2"}}, Append: "GD_LOG=0"})
	v.WaitLog(t, 450) // the ring of files has come round
	v.WaitLogSweeps(t, 1)
	if err := v.Crash(); err != nil {
		t.Fatal(err)
	}
	r := v.Invariants()
	if r.LogVerified == 0 || r.LogSweeps == 0 {
		t.Errorf("nothing was read: %+v", r)
	}
	disk := v.Config().Disks[0]
	c := CheckLog(t, disk)
	t.Logf("memory said %d safe, %d begun; the disk has %+v", r.LogSynced, r.LogStarted, c)
	// The report is up to a second old.
	if c.Bad != 0 || c.Last < r.LogSynced || c.First == 0 || c.Records != c.Last-c.First+1 {
		t.Errorf("the disk has %+v, memory said %d", c, r.LogSynced)
	}
	if err := CheckFS(t.Context(), disk); err != nil {
		t.Error(err)
	}
}

// TestDiskLogMisses is the negative control: zeros over a record under the guest's
// feet are seen, by the guest and from outside.
func TestDiskLogMisses(t *testing.T) {
	v := Start(t, Config{MemoryMiB: 192, Disks: []Disk{{FS: "ext4", Format: "raw"}}, Append: "GD_LOG=100"})
	v.WaitLog(t, 100)
	disk := v.Config().Disks[0]
	f, err := os.OpenFile(disk.Path, os.O_RDWR, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	content := make([]byte, disk.MiB<<20)
	if _, err := f.ReadAt(content, 0); err != nil {
		t.Fatal(err)
	}
	// A record begins with the magic number and its own.
	at := bytes.Index(content, append([]byte("cergolkc"), 70, 0, 0, 0, 0, 0, 0, 0))
	if at < 0 {
		t.Fatal("record 70 is not on the disk")
	}
	if _, err := f.WriteAt(make([]byte, 4096), int64(at)); err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
	defer cancel()
	if _, err := v.AwaitSerial(ctx, `^BAD kind=log seq=70 what=content`); err != nil {
		t.Error(err)
	}
	if err := v.Crash(); err != nil {
		t.Fatal(err)
	}
	if c := CheckLog(t, disk); c.Bad == 0 {
		t.Errorf("from outside nothing is seen: %+v", c)
	}
}
