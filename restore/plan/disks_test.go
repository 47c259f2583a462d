package plan

import (
	"slices"
	"strings"
	"testing"

	"github.com/ckagent/ckagent/agent/problem"
)

const diskDir = "/disks/vm"

// TestDisks: the original's image goes, everything about the drive stays.
func TestDisks(t *testing.T) {
	const m = "-machine pc-q35-7.2 "
	a := Disk{Name: "d0", Device: "d0", Path: "/vm/a.qcow2"}
	node := Disk{Name: "dev0", Node: "n0", Path: "/vm/a.qcow2"}
	wrapped := func(d Disk) Disk { d.Wrapped = true; return d }
	for _, c := range []struct {
		name     string
		disk     Disk
		in, want string
	}{
		{"drive", a, "-drive if=none,id=d0,format=qcow2,file=/vm/a.qcow2,cache=none,aio=native,discard=unmap,throttling.iops-total=100,werror=stop",
			"-drive if=none,id=d0,format=qcow2,cache=none,aio=native,discard=unmap,throttling.iops-total=100,werror=stop,file=/disks/vm/d0.qcow2"},
		{"raw drive", a, "-drive if=virtio,id=d0,format=raw,file=/vm/a.qcow2,size=1G,l2-cache-size=1M", "-drive if=virtio,id=d0,format=qcow2,l2-cache-size=1M,file=/disks/vm/d0.qcow2"},
		{"drive with nested file", a, "-drive if=none,id=d0,driver=qcow2,file.driver=file,file.filename=/vm/a.qcow2,backing.driver=raw,backing.file.filename=/b",
			"-drive if=none,id=d0,file=/disks/vm/d0.qcow2,format=qcow2"},
		{"network drive", a, "-drive id=d0,file=nbd://host/x,format=raw", "-drive id=d0,format=qcow2,file=/disks/vm/d0.qcow2"},
		{"unnamed drive", Disk{Name: "virtio0", Device: "virtio0", Path: "/vm/a.img"}, "-drive file=/vm/a.img,if=virtio", "-drive if=virtio,file=/disks/vm/virtio0.qcow2,format=qcow2"},
		{"relative name", Disk{Name: "virtio0", Device: "virtio0", Path: "/home/vm/a.img"}, "-drive file=a.img,if=virtio", "-drive if=virtio,file=/disks/vm/virtio0.qcow2,format=qcow2"},
		{"short form", Disk{Name: "ide0-hd0", Device: "ide0-hd0", Path: "/vm/a.img"}, "-hda /vm/a.img", "-hda /disks/vm/ide0-hd0.qcow2"},
		{"LUKS drive", wrapped(a), "-drive id=d0,format=luks,key-secret=s,file=/vm/a.luks,cache=none",
			"-drive id=d0,format=luks,key-secret=s,cache=none,file.driver=qcow2,file.file.driver=file,file.file.filename=/disks/vm/d0.qcow2"},
		{"encrypted qcow2 drive", wrapped(a), "-drive id=d0,format=qcow2,encrypt.key-secret=s,file=/vm/a.qcow2",
			"-drive id=d0,format=qcow2,encrypt.key-secret=s,file.driver=qcow2,file.file.driver=file,file.file.filename=/disks/vm/d0.qcow2"},

		{"nodes", node, "-blockdev driver=file,node-name=f0,filename=/vm/a.qcow2,cache.direct=on,aio=native -blockdev driver=qcow2,node-name=n0,file=f0,discard=unmap -device virtio-blk-pci,drive=n0,serial=X",
			"-blockdev driver=file,node-name=f0,filename=/disks/vm/dev0.qcow2,cache.direct=on,aio=native -blockdev driver=qcow2,node-name=n0,file=f0,discard=unmap -device virtio-blk-pci,drive=n0,serial=X"},
		{"raw nodes", node, "-blockdev driver=file,node-name=f0,filename=/vm/a -blockdev driver=raw,node-name=n0,file=f0,offset=4096,size=8192 -device virtio-blk-pci,drive=n0",
			"-blockdev driver=file,node-name=f0,filename=/disks/vm/dev0.qcow2 -blockdev driver=qcow2,node-name=n0,file=f0 -device virtio-blk-pci,drive=n0"},
		{"inline", node, "-blockdev driver=raw,node-name=n0,file.driver=host_device,file.filename=/dev/vg/a,file.aio=native,file.pr-manager=p -device virtio-blk-pci,drive=n0",
			"-blockdev driver=qcow2,node-name=n0,file.driver=file,file.filename=/disks/vm/dev0.qcow2,file.aio=native -device virtio-blk-pci,drive=n0"},
		{"no format", node, "-blockdev driver=host_device,node-name=n0,filename=/dev/vg/a,aio=io_uring,cache.direct=on -device virtio-blk-pci,drive=n0",
			"-blockdev driver=qcow2,node-name=n0,cache.direct=on,file.driver=file,file.filename=/disks/vm/dev0.qcow2,file.aio=io_uring -device virtio-blk-pci,drive=n0"},
		{"throttled", Disk{Name: "dev0", Node: "t0", Path: "/vm/a"},
			"-object throttle-group,id=g,x-iops-total=100 -blockdev driver=file,node-name=f0,filename=/vm/a -blockdev driver=qcow2,node-name=n0,file=f0 -blockdev driver=throttle,node-name=t0,throttle-group=g,file=n0 -device scsi-hd,drive=t0",
			"-object throttle-group,id=g,x-iops-total=100 -blockdev driver=file,node-name=f0,filename=/disks/vm/dev0.qcow2 -blockdev driver=qcow2,node-name=n0,file=f0 -blockdev driver=throttle,node-name=t0,throttle-group=g,file=n0 -device scsi-hd,drive=t0"},
		{"a chain of nodes", node,
			"-blockdev driver=file,node-name=bf,filename=/vm/base -blockdev driver=qcow2,node-name=b,file=bf,read-only=on -blockdev driver=file,node-name=f0,filename=/vm/a.qcow2 -blockdev driver=qcow2,node-name=n0,file=f0,backing=b -device virtio-blk-pci,drive=n0 -blockdev driver=null-co,node-name=spare",
			"-blockdev driver=file,node-name=f0,filename=/disks/vm/dev0.qcow2 -blockdev driver=qcow2,node-name=n0,file=f0 -device virtio-blk-pci,drive=n0 -blockdev driver=null-co,node-name=spare"},
		{"JSON", node, `-blockdev {"driver":"nbd","node-name":"f0","server":{"type":"inet","host":"h","port":"1"},"cache":{"direct":true}} -blockdev {"driver":"raw","node-name":"n0","file":"f0","backing":null} -device virtio-blk-pci,drive=n0`,
			`-blockdev {"driver":"file","node-name":"f0","cache":{"direct":true},"filename":"/disks/vm/dev0.qcow2"} -blockdev {"driver":"qcow2","node-name":"n0","file":"f0"} -device virtio-blk-pci,drive=n0`},
		{"LUKS nodes", wrapped(node), "-blockdev driver=file,node-name=f0,filename=/vm/a,aio=native -blockdev driver=luks,node-name=n0,file=f0,key-secret=s -device virtio-blk-pci,drive=n0",
			"-blockdev driver=qcow2,node-name=f0,file.driver=file,file.filename=/disks/vm/dev0.qcow2,file.aio=native -blockdev driver=luks,node-name=n0,file=f0,key-secret=s -device virtio-blk-pci,drive=n0"},
	} {
		t.Run(c.name, func(t *testing.T) {
			rec := recorded(words(m + c.in)...)
			rec.Disks = []Disk{c.disk}
			p, got := build(t, rec, Options{DiskDir: diskDir})
			if want := words(m + c.want); !slices.Equal(got, want) {
				t.Errorf("\ngot  %s\nwant %s", strings.Join(got, " "), strings.Join(want, " "))
			}
			if len(p.Disks) != 1 || !strings.HasPrefix(p.Disks[0].Path, diskDir+"/") || len(p.Files) != 0 {
				t.Errorf("disks %+v, files %+v", p.Disks, p.Files)
			}
			if direct := strings.Contains(c.in, "cache=none") || strings.Contains(c.in, "direct"); p.Disks[0].Direct != direct {
				t.Errorf("direct %v, want %v", p.Disks[0].Direct, direct)
			}
			if len(p.OldFiles) == 0 && strings.Contains(c.in, "/vm/a") {
				t.Error("the original's image is not looked at for signs of life")
			}
		})
	}
}

// TestDiskMapping: a mapping of exactly the image says where its stand-in is made;
// others do not.
func TestDiskMapping(t *testing.T) {
	rec := recorded(words("-drive id=d0,format=qcow2,file=/vm/a.qcow2 -drive id=d1,format=raw,file=/vm/b.raw -cdrom /vm/c.iso")...)
	rec.Disks = []Disk{{Name: "d0", Device: "d0", Path: "/vm/a.qcow2"}, {Name: "d1", Device: "d1", Path: "/vm/b.raw"}}
	p, args := build(t, rec, Options{DiskDir: diskDir, Map: maps(t, "/vm/a.qcow2=/new/a.qcow2", "/vm=/elsewhere", "/disks=/never")[:2], CloneID: "x"})
	want := "-drive id=d0,format=qcow2,file=/new/a.qcow2 -drive id=d1,format=qcow2,file=/disks/vm/d1.qcow2 -cdrom /elsewhere/c.iso"
	if got := strings.Join(args, " "); !strings.Contains(got, want) {
		t.Errorf("got %s\nwant %s", got, want)
	}
	if len(p.Files) != 1 || p.Files[0].Path != "/elsewhere/c.iso" || p.Files[0].Writable {
		t.Errorf("files %+v", p.Files)
	}
}

func TestDiskRefusals(t *testing.T) {
	for _, c := range []struct {
		name, in, word string
		disks          []Disk
	}{
		{"no such drive", "-m 1G", "d0", []Disk{{Name: "d0", Device: "d0", Path: "/vm/a"}}},
		{"no such node", "-blockdev driver=null-co,node-name=x", "d0", []Disk{{Name: "d0", Node: "y", Path: "/vm/a"}}},
		{"a node without a child", "-blockdev driver=qcow2,node-name=x -device virtio-blk,drive=x", "x", []Disk{{Name: "d0", Node: "x", Path: "/vm/a"}}},
		{"a child that is missing", "-blockdev driver=qcow2,node-name=x,file=z -device virtio-blk,drive=x", "z", []Disk{{Name: "d0", Node: "x", Path: "/vm/a"}}},
		{"filters in a circle", "-blockdev driver=throttle,node-name=x,file=x -device virtio-blk,drive=x", "filters", []Disk{{Name: "d0", Node: "x", Path: "/vm/a"}}},
		{"encrypted, short form", "-hda /vm/a", "encrypted", []Disk{{Name: "ide0-hd0", Device: "ide0-hd0", Path: "/vm/a", Wrapped: true}}},
		{"not of the checkpoint, for a clone", "-drive id=d0,file=/vm/a,format=raw", "--map", nil},
	} {
		rec := recorded(words(c.in)...)
		rec.Disks = c.disks
		_, err := Build(rec, Options{RunDir: runDir, DiskDir: diskDir, CloneID: "x"})
		if !problem.Is(err, problem.Refused) || !strings.Contains(err.Error(), c.word) {
			t.Errorf("%s: %v", c.name, err)
		}
	}
	// Two drives mapped to one file.
	rec := recorded(words("-drive id=d0,file=/vm/a -drive id=d1,file=/vm/b")...)
	rec.Disks = []Disk{{Name: "d0", Device: "d0", Path: "/vm/a"}, {Name: "d1", Device: "d1", Path: "/vm/b"}}
	if _, err := Build(rec, Options{RunDir: runDir, DiskDir: diskDir, Map: maps(t, "/vm/a=/n", "/vm/b=/n")}); !problem.Is(err, problem.Refused) {
		t.Errorf("one file for two: %v", err)
	}
}
