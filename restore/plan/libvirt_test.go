package plan

import (
	"slices"
	"strings"
	"testing"

	"github.com/ckagent/ckagent/agent/problem"
)

// domain is what libvirt 9.0 gives QEMU, shortened, after its descriptors were
// named.
func domain(more ...string) Recorded {
	r := recorded(append([]string{
		"-name", "guest=demo,debug-threads=on", "-S",
		"-object", `{"qom-type":"secret","id":"masterKey0","format":"raw","file":"/var/lib/libvirt/qemu/domain-1-demo/master-key.aes"}`,
		"-machine", "pc-q35-7.2,usb=off,memory-backend=pc.ram", "-accel", "tcg",
		"-object", `{"qom-type":"memory-backend-ram","id":"pc.ram","size":268435456}`,
		"-chardev", "socket,id=charmonitor,path=/var/lib/libvirt/qemu/domain-1-demo/monitor.sock,server=on,wait=off",
		"-mon", "chardev=charmonitor,id=monitor,mode=control", "-no-shutdown",
		"-chardev", "file,id=charserial0,path=/dev/fdset/0,append=on",
		"-sandbox", "on,obsolete=deny,elevateprivileges=deny,spawn=deny,resourcecontrol=deny",
	}, more...)...)
	r.Libvirt = true
	return r
}

func TestLibvirtDomain(t *testing.T) {
	p, args := build(t, domain(
		"-chardev", "socket,id=charchannel0,path=/run/libvirt/qemu/channel/1-demo/org.qemu.guest_agent.0,server=on,wait=off",
		"-vnc", "unix:/var/lib/libvirt/qemu/domain-1-demo/vnc.sock",
		"-chardev", "socket,id=other,path=/srv/console.sock,server=on,wait=off",
	), Options{})
	want := []string{
		"-name", "guest=demo,debug-threads=on",
		"-machine", "pc-q35-7.2,usb=off,memory-backend=pc.ram", "-accel", "tcg",
		"-object", `{"qom-type":"memory-backend-ram","id":"pc.ram","size":268435456}`,
		"-chardev", "file,id=charserial0,path=" + ownDir + "/charserial0.log,append=on",
		"-sandbox", "on,obsolete=deny,elevateprivileges=deny,spawn=deny,resourcecontrol=deny",
		"-chardev", "socket,id=charchannel0,path=" + ownDir + "/charchannel0.sock,server=on,wait=off",
		"-vnc", "unix:" + ownDir + "/vnc.sock",
		"-chardev", "socket,id=other,path=/srv/console.sock,server=on,wait=off",
	}
	if !slices.Equal(args, want) {
		t.Errorf("got  %q\nwant %q", args, want)
	}
	if !slices.Contains(p.OldUnix, "/var/lib/libvirt/qemu/domain-1-demo/monitor.sock") {
		t.Errorf("the original's monitor is not looked for: %v", p.OldUnix)
	}
	for _, f := range p.Files {
		if strings.Contains(f.Path, "/libvirt/") {
			t.Errorf("needs %s, which ended with the domain", f.Path)
		}
	}
}

// What looks like libvirt's but was not started by it is left alone.
func TestLikeLibvirt(t *testing.T) {
	r := domain()
	r.Libvirt = false
	_, args := build(t, r, Options{})
	if !slices.Contains(args, "-no-shutdown") || !slices.Contains(args, "-mon") {
		t.Errorf("got %q", args)
	}
}

func TestLibvirtNetworks(t *testing.T) {
	tap := []string{"-netdev", "tap,id=hostnet0,ifname=vnet0,script=no,downscript=no"}
	if _, err := Build(domain(tap...), Options{RunDir: runDir}); !problem.Is(err, problem.Refused) || !strings.Contains(err.Error(), "--map netdev:hostnet0=") {
		t.Errorf("a tap that libvirt removed: %v", err)
	}
	_, args := build(t, domain(tap...), Options{Map: maps(t, "netdev:hostnet0=tap,ifname=tap7,script=no,downscript=no")})
	if !slices.Contains(args, "tap,ifname=tap7,script=no,downscript=no,id=hostnet0") {
		t.Errorf("mapped: %q", args)
	}
	if _, err := Build(domain("-netdev", "tap,id=n,ifname=mine0,script=no,downscript=no"), Options{RunDir: runDir}); err != nil {
		t.Errorf("a tap that somebody else made: %v", err)
	}
	build(t, domain("-netdev", "user,id=hostnet0"), Options{})
}

// After an external snapshot the nodes of the image before it are used by nobody.
func TestLibvirtSnapshot(t *testing.T) {
	r := domain(
		"-blockdev", `{"driver":"file","filename":"/d/base.qcow2","node-name":"libvirt-1-storage","auto-read-only":true}`,
		"-blockdev", `{"node-name":"libvirt-1-format","read-only":false,"driver":"qcow2","file":"libvirt-1-storage","backing":null}`,
		"-device", `{"driver":"virtio-blk-pci","drive":"libvirt-2-format","id":"virtio-disk0"}`,
		"-blockdev", `{"driver":"qcow2","node-name":"libvirt-2-format","file":{"driver":"file","filename":"/d/over.qcow2"}}`)
	r.Disks = []Disk{{Name: "virtio-disk0", Node: "libvirt-2-format", Path: "/d/over.qcow2"}}
	p, args := build(t, r, Options{DiskDir: "/copies"})
	text := strings.Join(args, " ")
	for _, gone := range []string{"base.qcow2", "over.qcow2", "libvirt-1"} {
		if strings.Contains(text, gone) {
			t.Errorf("%s is still there: %s", gone, text)
		}
	}
	if !strings.Contains(text, "/copies/virtio-disk0.qcow2") || len(p.Disks) != 1 {
		t.Errorf("the disk is not: %s", text)
	}
}
