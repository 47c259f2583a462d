package vm

import (
	"fmt"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"

	"github.com/ckagent/ckagent/agent/qmp"
)

func execute(t *testing.T, q *qmp.Client, command string, args map[string]any) {
	t.Helper()
	if err := q.Execute(t.Context(), command, args, nil); err != nil {
		t.Fatalf("%s %v: %v", command, args, err)
	}
}

// qtree is the machine's devices as QEMU prints them, without what legitimately
// differs between two runs.
var unstable = regexp.MustCompile(`(?m)^.*(hotplugged|legacy-|addr = .*0x[0-9a-f]{9}).*\n`)

func qtree(t *testing.T, q *qmp.Client) map[string]int {
	t.Helper()
	text, err := q.HMP(t.Context(), "info qtree")
	if err != nil {
		t.Fatal(err)
	}
	text = unstable.ReplaceAllString(strings.ReplaceAll(text, "\r", ""), "")
	// Devices of a bus may come in another order: compare as a bag of devices.
	bag := make(map[string]int)
	for _, dev := range strings.Split(text, "dev: ") {
		bag[regexp.MustCompile(`(?m)^\s+`).ReplaceAllString(dev, "")]++
	}
	return bag
}

func diffBags(a, b map[string]int) (out []string) {
	for k, n := range a {
		if b[k] != n {
			out = append(out, fmt.Sprintf("%d against %d of %q", n, b[k], k))
		}
	}
	slices.Sort(out)
	return out
}

// rebuild starts what a description says makes this machine now, with the
// monitor moved, and returns its target.
func rebuild(t *testing.T, b build, m Machine, from, to string) *Target {
	t.Helper()
	args := slices.Clone(m.Current[1:])
	for i := range args {
		if strings.HasPrefix(args[i], "unix:") {
			args[i] = "null"
			if args[i-1] == "-qmp" {
				args[i-1] = "-serial"
			}
		}
		args[i] = strings.ReplaceAll(args[i], from, to)
	}
	// The board's first serial port was made by QEMU's default, which a -serial
	// would replace: take the pair out instead.
	for i := 0; i+1 < len(args); i++ {
		if args[i] == "-serial" && args[i+1] == "null" {
			args = slices.Delete(args, i, i+2)
			break
		}
	}
	return openQEMU(t, b, args...)
}

// TestDescribeFollowsTheMachine changes a running machine in every way that can
// be expressed, and holds a machine built from the description against it.
func TestDescribeFollowsTheMachine(t *testing.T) {
	for _, b := range builds(t) {
		t.Run(b.name, func(t *testing.T) {
			dir := t.TempDir()
			cd1, cd2 := truncated(t, dir, "one.iso", 1<<20), truncated(t, dir, "two,comma.iso", 1<<20)
			img := truncated(t, dir, "ro.img", 1<<20)
			tgt := openQEMU(t, b, "-S", "-M", "q35", "-m", "128,slots=4,maxmem=2G", "-smp", "1,maxcpus=2",
				"-device", "pcie-root-port,id=rp0,slot=1", "-device", "pcie-root-port,id=rp1,slot=2", "-device", "pcie-root-port,id=rp2,slot=3",
				"-device", "pcie-root-port,id=rp3,slot=4", "-device", "pcie-root-port,id=rp4,slot=5",
				"-netdev", "user,id=n0", "-device", "virtio-net-pci,netdev=n0,id=gone,bus=rp3",
				"-netdev", "user,id=n9,net=10.9.0.0/24", "-netdev", "user,id=unused", "-chardev", "null,id=c0", "-chardev", "null,id=c1",
				"-object", "rng-builtin,id=r0", "-object", "rng-builtin,id=r1",
				"-device", "virtio-scsi-pci,id=scsi0", "-device", "scsi-cd,id=cd,drive=disc", "-drive", "if=none,id=disc,media=cdrom,file="+cd1,
				"-cdrom", cd1, "-rtc", "base=utc,clock=vm", "-name", "follow")
			q := tgt.QMP
			execute(t, q, "object-add", map[string]any{"qom-type": "memory-backend-ram", "id": "mem1", "size": 128 << 20})
			execute(t, q, "device_add", map[string]any{"driver": "pc-dimm", "id": "dimm1", "memdev": "mem1"})
			execute(t, q, "device_add", map[string]any{"driver": "virtio-net-pci", "id": "hn", "netdev": "n9", "bus": "rp0", "mac": "52:54:00:aa:bb:cc", "guest_tso4": false})
			execute(t, q, "device_add", map[string]any{"driver": "virtio-scsi-pci", "id": "scsi1", "bus": "rp1"})
			execute(t, q, "blockdev-add", map[string]any{"driver": "raw", "node-name": "img", "read-only": true,
				"file": map[string]any{"driver": "file", "filename": img, "read-only": true}})
			execute(t, q, "device_add", map[string]any{"driver": "scsi-hd", "id": "hd1", "bus": "scsi1.0", "drive": "img"})
			execute(t, q, "device_add", map[string]any{"driver": "virtio-rng-pci", "rng": "r0", "bus": "rp2"})  // no id
			execute(t, q, "device_add", map[string]any{"driver": "virtio-rng-pci", "id": "late", "bus": "rp4"}) // makes its backend itself
			execute(t, q, "chardev-add", map[string]any{"id": "c9", "backend": map[string]any{"type": "null", "data": map[string]any{}}})
			execute(t, q, "object-del", map[string]any{"id": "r1"})
			execute(t, q, "netdev_del", map[string]any{"id": "unused"})
			execute(t, q, "chardev-remove", map[string]any{"id": "c1"})
			execute(t, q, "blockdev-change-medium", map[string]any{"id": "cd", "filename": cd2, "format": "raw"})
			execute(t, q, "eject", map[string]any{"device": "ide2-cd0", "force": true})
			var cpus []struct {
				Props map[string]any `json:"props"`
				Type  string         `json:"type"`
				Path  string         `json:"qom-path"`
			}
			if err := q.Execute(t.Context(), "query-hotpluggable-cpus", nil, &cpus); err != nil {
				t.Fatal(err)
			}
			for _, c := range cpus {
				if c.Path == "" {
					c.Props["driver"], c.Props["id"] = c.Type, "cpu1"
					execute(t, q, "device_add", c.Props)
				}
			}
			m, err := tgt.Describe(t.Context())
			if err != nil {
				t.Fatal(err)
			}
			for _, c := range m.Changes {
				t.Logf("%s: %s\n  - %q\n  + %q", c.Kind, c.Reason, c.Old, c.New)
			}
			if len(m.Refusals) != 0 {
				t.Fatalf("refusals %+v", m.Refusals)
			}
			if m.RTC != "base=utc,clock=vm" || m.Name != "follow" || m.SMP["maxcpus"] != 2 || m.CPU.How == "argument" || len(m.CPU.Props) == 0 {
				t.Errorf("machine %+v", m)
			}
			if !slices.Contains(m.Argv, "user,id=unused") || slices.Contains(m.Current, "user,id=unused") {
				t.Errorf("a deleted backend: argv %q, current %q", m.Argv, m.Current)
			}
			twin := rebuild(t, b, m, "\x00", "\x00")
			if d := append(diffBags(qtree(t, q), qtree(t, twin.QMP)), diffBags(qtree(t, twin.QMP), qtree(t, q))...); len(d) != 0 {
				t.Errorf("the rebuilt machine differs:\n%s", strings.Join(d, "\n"))
			}
			one, err := tgt.Layout(t.Context())
			if err != nil {
				t.Fatal(err)
			}
			two, err := twin.Layout(t.Context())
			if err != nil {
				t.Fatal(err)
			}
			names := func(blocks []RAMBlock) (out []string) {
				for _, blk := range blocks {
					out = append(out, fmt.Sprint(blk.Name, blk.TotalBytes, blk.GPA))
				}
				slices.Sort(out)
				return out
			}
			if a, b := names(one), names(two); !slices.Equal(a, b) {
				t.Errorf("blocks %q, rebuilt %q", a, b)
			}
			checkLayout(t, tgt, one)
			// The twin was built from the description, so it has nothing to add.
			again, err := twin.Describe(t.Context())
			if err != nil || len(again.Changes)+len(again.Refusals) != 0 {
				t.Errorf("the rebuilt machine differs from its own command line: %+v %+v %v", again.Changes, again.Refusals, err)
			}
		})
	}
}

func TestDescribeRefusesWhatItCannotExpress(t *testing.T) {
	b := builds(t)[0]
	dir := t.TempDir()
	kernel := copied(t, dir, "/usr/share/qemu/linuxboot_dma.bin")
	rom := truncated(t, dir, "gone.img", 1<<20)
	tgt := openQEMU(t, b, "-S", "-M", "q35", "-m", "64", "-option-rom", kernel,
		"-drive", "if=none,id=d,readonly=on,format=raw,file="+rom, "-device", "virtio-blk-pci,drive=d",
		"-object", "secret,id=s,data=hunter2", "-device", "pcie-root-port,id=rp0")
	q := tgt.QMP
	execute(t, q, "object-add", map[string]any{"qom-type": "throttle-group", "id": "tg"})
	execute(t, q, "netdev_add", map[string]any{"type": "hubport", "id": "hp", "hubid": 3})
	execute(t, q, "netdev_add", map[string]any{"type": "user", "id": "plain", "net": "10.9.0.0/24"})
	execute(t, q, "netdev_add", map[string]any{"type": "user", "id": "un", "hostfwd": []map[string]any{{"str": "tcp:127.0.0.1:0-:22"}}})
	execute(t, q, "device_add", map[string]any{"driver": "qemu-xhci", "id": "usb", "bus": "rp0"})
	execute(t, q, "chardev-add", map[string]any{"id": "f", "backend": map[string]any{"type": "file", "data": map[string]any{"out": filepath.Join(dir, "log")}}})
	if err := os.Remove(kernel); err != nil {
		t.Fatal(err)
	}
	if err := os.Remove(rom); err != nil {
		t.Fatal(err)
	}
	m, err := tgt.Describe(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	want := []string{"added-chardev", "added-netdev", "added-object", "missing-file", "plugged-device"}
	if got := codes(m.Refusals); !slices.Equal(got, want) {
		t.Errorf("refusals %q, want %q: %+v", got, want, m.Refusals)
	}
	for _, r := range m.Refusals {
		if r.Object == "" || r.Reason == "" || r.Advice == "" {
			t.Errorf("incomplete: %+v", r)
		}
	}
	text := fmt.Sprintf("%+v", m)
	if strings.Contains(text, "hunter2") || len(m.Secrets) != 1 || m.Secrets[0].ID != "s" {
		t.Errorf("secret kept or not told: %+v", m.Secrets)
	}
	if !strings.Contains(strings.Join(m.Current, " "), m.Secrets[0].Placeholder) {
		t.Errorf("no placeholder in %q", m.Current)
	}
}

func TestRefusals(t *testing.T) {
	dir := t.TempDir()
	shm, err := os.MkdirTemp("/dev/shm", "ckvm")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(shm) })
	disk := truncated(t, dir, "disk.img", 1<<20)
	for _, b := range builds(t) {
		for _, c := range []struct {
			name string
			args []string
			want []string
			say  string // must appear
		}{
			{"writable disk", []string{"-drive", "if=virtio,id=vda,format=raw,file=" + disk}, nil, ""},
			{"writable node", []string{"-blockdev", "driver=file,node-name=f0,filename=" + disk, "-device", "virtio-blk-pci,drive=f0,id=blk"}, nil, ""},
			{"snapshot=on", []string{"-drive", "if=virtio,id=vdb,snapshot=on,format=raw,file=" + disk}, []string{"temporary-disk"}, "temporary"},
			{"global snapshot", []string{"-snapshot", "-drive", "if=virtio,id=vdc,format=raw,file=" + disk}, []string{"temporary-disk"}, "temporary"},
			{"floppy", []string{"-drive", "if=floppy,format=raw,file=" + disk}, nil, ""},
			{"read-only disk", []string{"-drive", "if=virtio,readonly=on,format=raw,file=" + disk, "-cdrom", disk}, nil, ""},
			{"blocked device", []string{"-device", "nvme,serial=1"}, []string{"migration-blocker"}, "nvme"},
			{"incoming", []string{"-incoming", "defer"}, []string{"run-state"}, "inmigrate"},
			{"nvdimm", []string{"-M", "q35,nvdimm=on", "-m", "64,slots=2,maxmem=1G", "-object", "memory-backend-file,id=nv,size=16M,share=on,mem-path=" + shm + "/nv",
				"-device", "nvdimm,id=nv1,memdev=nv"}, []string{"persistent-memory"}, "nv1"},
		} {
			t.Run(b.name+"/"+c.name, func(t *testing.T) {
				tgt := openQEMU(t, b, append([]string{"-S", "-M", "q35", "-m", "64"}, c.args...)...)
				got, err := tgt.Refusals(t.Context())
				if err != nil {
					t.Fatal(err)
				}
				if !slices.Equal(codes(got), c.want) {
					t.Errorf("codes %q, want %q: %+v", codes(got), c.want, got)
				}
				if c.want == nil {
					return
				}
				if e := tgt.Refused("attach", got); e == nil || !strings.Contains(e.Error(), c.say) {
					t.Errorf("%v does not say %q", e, c.say)
				}
			})
		}
	}
}
