package plan

import (
	"regexp"
	"strings"
)

// libvirtPrivate matches paths that libvirt makes for one run of a domain and
// removes when that ends.
var libvirtPrivate = regexp.MustCompile(`/libvirt/(qemu|swtpm)/(.*/)?(domain-)?[0-9]+-[^/]+/|^(/var)?/run/libvirt/qemu/`)

// managed takes out of a libvirt domain's command line what only serves libvirt:
// its monitor, the key for its secrets, QEMU staying around after the guest has
// powered off. What lies in directories that ended with the domain moves into the
// run directory. Networks come as descriptors of devices that libvirt made and
// removed, and have to be named anew.
func (b *builder) managed() error {
	if !b.rec.Libvirt {
		return nil
	}
	monitors := map[string]bool{}
	b.drop(func(e *entry) bool {
		if e.Name == "chardev" && e.get("id") == "charmonitor" {
			monitors["charmonitor"] = true
			b.change("-chardev charmonitor removed", "it is libvirt's monitor, and libvirt does not know this QEMU")
			return true
		}
		return false
	})
	b.drop(func(e *entry) bool { return e.Name == "mon" && monitors[e.get("chardev")] })
	b.drop(func(e *entry) bool {
		switch {
		case e.Name == "object" && e.get("qom-type") == "secret" && e.get("id") == "masterKey0":
			b.change("-object masterKey0 removed", "libvirt's key for the domain's secrets ended with the domain")
		case e.Name == "no-shutdown":
			b.change("-no-shutdown removed", "nobody would end QEMU after the guest has powered off")
		default:
			return false
		}
		return true
	})
	for e := range b.named("chardev") {
		if p := e.get("path"); e.get("backend") == "socket" && e.isOn("server") && libvirtPrivate.MatchString(p) && !e.mapped["path"] {
			b.ownSocket(e, e.get("id"), "libvirt removed the directory of "+p)
		}
	}
	for e := range b.named("vnc") {
		if p, ok := strings.CutPrefix(e.get("vnc"), "unix:"); ok && libvirtPrivate.MatchString(p) && !e.mapped["vnc"] {
			e.kv.Set("vnc", "unix:"+b.own("vnc.sock"))
			b.change("-vnc unix:"+b.own("vnc.sock"), "libvirt removed the directory of "+p)
		}
	}
	for e := range b.named("spice") {
		if p := e.get("addr"); e.isOn("unix") && libvirtPrivate.MatchString(p) && !e.mapped["addr"] {
			e.kv.Set("addr", b.own("spice.sock"))
			b.change("-spice unix:"+b.own("spice.sock"), "libvirt removed the directory of "+p)
		}
	}
	return nil
}

// unmade refuses a tap device that libvirt made and has removed.
func (b *builder) unmade(e *entry) error {
	name := e.get("ifname")
	if !b.rec.Libvirt || e.get("type") != "tap" || !strings.HasPrefix(name, "vnet") && !strings.HasPrefix(name, "macvtap") {
		return nil
	}
	id := e.get("id")
	return b.refuse("netdev "+id, "its device %s was libvirt's, which removed it with the domain", name).
		WithHint("name one that you made and connected: --map netdev:%s=tap,ifname=NAME,script=no,downscript=no; or none: --map netdev:%s=none; "+
			"or give the domain back to libvirt: ckagent export --format libvirt, virsh restore", id, id)
}
