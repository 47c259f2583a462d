package vmtest

import (
	"context"
	"fmt"
	"io"
	"net"
	"os"
	"path/filepath"
	"strconv"
	"strings"

	"github.com/ckagent/ckagent/tools/guest"
)

// Guest is what runs inside.
type Guest int

const (
	Linux   Guest = iota // the self-checking Linux guest
	Mini                 // the multiboot guest: the only one for a nested KVM
	NoGuest              // firmware only, unless Args bring something
)

// Backend is how guest RAM is backed.
type Backend int

const (
	Anonymous Backend = iota // QEMU's default
	Memfd                    // memory-backend-memfd, share=on
	FileTmpfs                // memory-backend-file, share=off, on tmpfs
	FileExt4                 // memory-backend-file, share=off, on a disk file system
	Prealloc                 // memory-backend-ram, prealloc=on
)

// Unlimited as a rate lets the guest write as fast as it can.
const Unlimited = -1

// Config describes a machine. The zero value is a one-CPU pc machine under TCG
// with 256 MiB and an idle Linux guest.
type Config struct {
	Name      string     // QEMU's -name; vmtest-<n> if empty
	QEMU      guest.QEMU // another QEMU than the machine's own (guest.QEMU10)
	Binary    string     // or just another program; qemu-system-x86_64 if empty
	Machine   string     // such as pc, q35, pc-i440fx-7.2; pc if empty
	Accel     string     // tcg or kvm; tcg if empty
	CPU       string     // QEMU's -cpu
	MemoryMiB int        // 256 if 0; above 3 GiB (pc) RAM is split at 4 GiB
	VCPUs     int        // 1 if 0
	Backend   Backend
	Guest     Guest
	Append    string   // more of the guest's command line (GD_AUDIT=1 ...)
	Args      []string // more of QEMU's command line

	WSMiB    int // the guest's working set; none if 0
	DirtyMiB int // the part of it that is rewritten; all if 0
	Rate     int // pages written a second: 1000 if 0, or Unlimited
	SweepMS  int // how long a verification of the whole working set takes: the guest's choice, two seconds or more, if 0

	OVMF          bool // UEFI firmware in two pflash drives
	VirtioDevices int  // that many virtio PCI devices of all kinds
	Disks         []Disk
	SQL           bool // a network card and an SQLite server on the disk (sqld): VM.SQLAddr
	Echo          bool // a network card and a TCP echo server: VM.EchoAddr
	Idle          bool // the mini guest halts when it has nothing to do, as others do; otherwise it spins. Not under KVM
	BeatUS        int  // heartbeat of a spinning vCPU every so many µs: VM.Beats
	Control       bool // a second QMP socket for the test itself: VM.ControlPath

	Paused bool   // start with -S; implies NoWait
	NoWait bool   // do not wait until the guest is ready
	Dir    string // for sockets and logs; a temporary one, removed by Kill, if empty
}

// paths of a machine's files inside its directory.
func (c *Config) path(name string) string { return filepath.Join(c.Dir, name) }

func (c *Config) fill() {
	def := func(s *string, v string) {
		if *s == "" {
			*s = v
		}
	}
	def(&c.Machine, "pc")
	def(&c.Accel, "tcg")
	def(&c.Binary, c.QEMU.Binary)
	def(&c.Binary, "qemu-system-x86_64")
	if c.MemoryMiB == 0 {
		c.MemoryMiB = 256
	}
	if c.VCPUs == 0 {
		c.VCPUs = 1
	}
	if c.Paused || c.Guest == NoGuest {
		c.NoWait = true
	}
}

// launch is what building a command line found out on the way.
type launch struct {
	argv     []string
	echoAddr string
	sqlAddr  string
	backing  string // a file outside Dir, to be removed
	beats    *Beats
}

// commandLine builds QEMU's arguments (without the program) and makes what they
// refer to: firmware variables, free ports, the beat socket.
func (c *Config) commandLine(ctx context.Context) (l launch, err error) {
	defer func() {
		if err != nil && l.beats != nil {
			l.beats.Close()
		}
	}()
	add := func(args ...string) { l.argv = append(l.argv, args...) }
	add(c.QEMU.Args...)
	machine := c.Machine + ",accel=" + c.Accel
	size := strconv.Itoa(c.MemoryMiB) + "M"
	backend := ""
	switch c.Backend {
	case Memfd:
		backend = "memory-backend-memfd,id=ram0,share=on,size=" + size
	case FileTmpfs:
		f, err := os.CreateTemp("/dev/shm", "vmtest-ram-")
		if err != nil {
			return l, err
		}
		f.Close()
		l.backing = f.Name()
		backend = "memory-backend-file,id=ram0,share=off,size=" + size + ",mem-path=" + l.backing
	case FileExt4:
		backend = "memory-backend-file,id=ram0,share=off,size=" + size + ",mem-path=" + c.path("ram")
	case Prealloc:
		backend = "memory-backend-ram,id=ram0,prealloc=on,size=" + size
	}
	if backend != "" {
		machine += ",memory-backend=ram0"
		add("-object", backend)
	}
	add("-name", c.Name, "-nodefaults", "-no-user-config", "-display", "none", "-no-reboot",
		"-machine", machine, "-m", size, "-smp", strconv.Itoa(c.VCPUs))
	if c.CPU != "" {
		add("-cpu", c.CPU)
	}
	// append=on: a restored machine goes on in the same log.
	add("-chardev", "file,id=serial0,append=on,path="+c.path("serial"), "-serial", "chardev:serial0")
	add("-qmp", "unix:"+c.path("qmp.sock")+",server=on,wait=off")
	if c.Control {
		add("-qmp", "unix:"+c.path("control.sock")+",server=on,wait=off")
	}
	if c.OVMF {
		fw, err := guest.OVMF(ctx)
		if err != nil {
			return l, err
		}
		if err := copyFile(c.path("vars.fd"), fw.Vars); err != nil {
			return l, err
		}
		add("-drive", "if=pflash,unit=0,format=raw,readonly=on,file="+fw.Code,
			"-drive", "if=pflash,unit=1,format=raw,file="+c.path("vars.fd"))
	}
	if c.Echo {
		port, err := freePort()
		if err != nil {
			return l, err
		}
		l.echoAddr = fmt.Sprintf("127.0.0.1:%d", port)
		add("-netdev", fmt.Sprintf("user,id=echo0,hostfwd=tcp:%s-:7", l.echoAddr), "-device", "virtio-net-pci,netdev=echo0,romfile=")
	}
	if c.SQL {
		port, err := freePort()
		if err != nil {
			return l, err
		}
		l.sqlAddr = fmt.Sprintf("127.0.0.1:%d", port)
		add("-netdev", fmt.Sprintf("user,id=sql0,hostfwd=tcp:%s-:%d", l.sqlAddr, sqlPort), "-device", "virtio-net-pci,netdev=sql0,romfile=")
	}
	disks, words, err := c.diskArgs(ctx)
	if err != nil {
		return l, err
	}
	add(disks...)
	if c.BeatUS > 0 {
		if l.beats, err = ListenBeats(); err != nil {
			return l, err
		}
		add("-chardev", fmt.Sprintf("udp,id=beat0,host=127.0.0.1,port=%d", l.beats.Port()), "-device", "isa-debugcon,iobase=0xe9,chardev=beat0")
	}
	add(virtioDevices(c.VirtioDevices)...)
	boot, err := c.guestArgs(ctx, words)
	if err != nil {
		return l, err
	}
	add(boot...)
	if c.Paused {
		add("-S")
	}
	add(c.Args...)
	return l, nil
}

// sqlPort is where the guest's database listens.
const sqlPort = 5432

// guestArgs are -kernel, -initrd and -append, with the words about disks.
func (c *Config) guestArgs(ctx context.Context, disk []string) ([]string, error) {
	rate := c.Rate
	switch {
	case rate == 0:
		rate = 1000
	case rate < 0:
		rate = 0
	}
	switch c.Guest {
	case Linux:
		build := guest.Linux
		if c.SQL {
			build = guest.SQLite
		}
		image, err := build(ctx)
		if err != nil {
			return nil, err
		}
		kernel := image.Kernel
		if c.OVMF {
			kernel = image.BzImage
		}
		words := append([]string{guest.KernelArgs}, disk...)
		if c.SQL {
			words = append(words, fmt.Sprintf("GD_SQL=%d", sqlPort))
		}
		if c.WSMiB > 0 {
			words = append(words, fmt.Sprintf("GD_WS=%d GD_RATE=%d GD_DIRTY=%d", c.WSMiB, rate, c.DirtyMiB))
			if n := c.sweepRate(); n > 0 {
				words = append(words, fmt.Sprintf("GD_SWEEP=%d", n))
			}
		}
		if c.Echo {
			words = append(words, "GD_ECHO=7")
		}
		if c.BeatUS > 0 {
			words = append(words, fmt.Sprintf("GD_SPIN=%d GD_BEAT_US=%d", c.VCPUs-1, c.BeatUS))
		}
		return []string{"-kernel", kernel, "-initrd", image.Initrd, "-append", strings.Join(append(words, c.Append), " ")}, nil
	case Mini:
		path, err := guest.Mini(ctx)
		if err != nil {
			return nil, err
		}
		line := fmt.Sprintf("ws=%d rate=%d dirty=%d beat=%d %s", c.WSMiB, rate, c.DirtyMiB, c.BeatUS, c.Append)
		if n := c.sweepRate(); n > 0 {
			line += fmt.Sprintf(" sweep=%d", n)
		}
		if c.Idle {
			line += " idle=1"
		}
		return []string{"-kernel", path, "-append", line}, nil
	}
	return nil, nil
}

// sweepRate is SweepMS in pages a second; 0: not set.
func (c *Config) sweepRate() int {
	if c.SweepMS == 0 {
		return 0
	}
	return c.WSMiB << 20 / 4096 * 1000 / c.SweepMS
}

// virtioDevices are n devices of all kinds that need nothing from the host: no
// writable disk, no tap, no vhost.
func virtioDevices(n int) (args []string) {
	for i := range n {
		id := fmt.Sprintf("v%d", i)
		switch i % 6 {
		case 0:
			args = append(args, "-netdev", "user,id=n"+id, "-device", "virtio-net-pci,romfile=,netdev=n"+id)
		case 1:
			args = append(args, "-blockdev", "driver=null-co,read-zeroes=on,read-only=on,size=1048576,node-name=b"+id, "-device", "virtio-blk-pci,drive=b"+id)
		case 2:
			args = append(args, "-device", "virtio-rng-pci")
		case 3:
			if i < 6 { // one balloon a machine
				args = append(args, "-device", "virtio-balloon-pci")
			} else {
				args = append(args, "-device", "virtio-rng-pci")
			}
		case 4:
			args = append(args, "-device", "virtio-serial-pci")
		case 5:
			args = append(args, "-device", "virtio-scsi-pci")
		}
	}
	return args
}

// freePort is a TCP port of the loopback interface that was free a moment ago.
func freePort() (int, error) {
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		return 0, err
	}
	defer l.Close()
	return l.Addr().(*net.TCPAddr).Port, nil
}

func copyFile(to, from string) error {
	in, err := os.Open(from)
	if err != nil {
		return err
	}
	defer in.Close()
	out, err := os.OpenFile(to, os.O_CREATE|os.O_WRONLY|os.O_TRUNC, 0o600)
	if err != nil {
		return err
	}
	_, err = io.Copy(out, in)
	if e := out.Close(); err == nil {
		err = e
	}
	return err
}
