package vmtest

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
)

// Disk is a disk image that a machine is given, made if it is not there.
type Disk struct {
	Path    string // disk<n>.<format> in the machine's directory if empty
	Format  string // qcow2 or raw; qcow2 if empty
	Bus     string // virtio-blk or virtio-scsi; virtio-blk if empty
	FS      string // ext4 or xfs: the file system on it; none if empty
	MiB     int    // 320 if 0: xfs makes nothing below 300
	Options string // more of -drive, after a comma
}

// fillDisks names the images and what they are.
func (c *Config) fillDisks() {
	for i := range c.Disks {
		d := &c.Disks[i]
		if d.Format == "" {
			d.Format = "qcow2"
		}
		if d.Bus == "" {
			d.Bus = "virtio-blk"
		}
		if d.MiB == 0 {
			d.MiB = 320
		}
		if d.Path == "" {
			d.Path = c.path(fmt.Sprintf("disk%d.%s", i, d.Format))
		}
	}
}

// diskArgs makes the images and returns the options for them, and the words that
// have the guest mount the first one with a file system.
func (c *Config) diskArgs(ctx context.Context) (args, words []string, err error) {
	c.fillDisks()
	blk, scsi := 0, 0
	for i, d := range c.Disks {
		if err := d.make(ctx); err != nil {
			return nil, nil, fmt.Errorf("make %s: %w", d.Path, err)
		}
		drive := fmt.Sprintf("if=none,id=disk%d,format=%s,file=%s", i, d.Format, d.Path)
		if d.Options != "" {
			drive += "," + d.Options
		}
		args = append(args, "-drive", drive)
		node := ""
		switch d.Bus {
		case "virtio-blk":
			node = "vd" + string(rune('a'+blk))
			blk++
			args = append(args, "-device", fmt.Sprintf("virtio-blk-pci,drive=disk%d,serial=DISK%d", i, i))
		case "virtio-scsi":
			if scsi == 0 {
				args = append(args, "-device", "virtio-scsi-pci,id=scsi0")
			}
			node = "sd" + string(rune('a'+scsi))
			scsi++
			args = append(args, "-device", fmt.Sprintf("scsi-hd,bus=scsi0.0,drive=disk%d,serial=DISK%d", i, i))
		default:
			return nil, nil, fmt.Errorf("no bus %q", d.Bus)
		}
		if d.FS != "" && words == nil {
			words = []string{"GD_DISK=" + node, "GD_FSTYPE=" + d.FS}
		}
	}
	return args, words, nil
}

// make creates the image with its file system.
func (d Disk) make(ctx context.Context) error {
	if _, err := os.Stat(d.Path); !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	raw := d.Path
	if d.Format != "raw" {
		raw = filepath.Join(filepath.Dir(d.Path), "."+filepath.Base(d.Path)+".raw")
		defer os.Remove(raw)
	}
	f, err := os.OpenFile(raw, os.O_CREATE|os.O_EXCL|os.O_WRONLY, 0o600)
	if err != nil {
		return err
	}
	if err := errors.Join(f.Truncate(int64(d.MiB)<<20), f.Close()); err != nil {
		return err
	}
	switch d.FS {
	case "ext4":
		err = runTool(ctx, "mkfs.ext4", "-q", "-F", raw)
	case "xfs":
		err = runTool(ctx, "mkfs.xfs", "-q", "-f", raw)
	case "":
	default:
		err = fmt.Errorf("no file system %q", d.FS)
	}
	if err != nil || raw == d.Path {
		return err
	}
	return runTool(ctx, "qemu-img", "convert", "-f", "raw", "-O", d.Format, raw, d.Path)
}

// runTool runs a program whose output matters only if it fails.
func runTool(ctx context.Context, name string, args ...string) error {
	var out bytes.Buffer
	c := exec.CommandContext(ctx, name, args...)
	c.Stdout, c.Stderr = &out, &out
	if err := c.Run(); err != nil {
		return fmt.Errorf("%s: %w: %s", strings.Join(c.Args, " "), err, lastLines(out.String(), 10))
	}
	return nil
}
