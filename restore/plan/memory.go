package plan

import (
	"slices"
	"strings"
)

// backendProps are the properties of memory-backend-file that the anonymous and
// memfd backends do not have.
var fileOnlyProps = []string{"mem-path", "align", "pmem", "readonly", "rom", "discard-data", "offset"}

// memory makes every backend of guest RAM start out empty: a page that is there
// before the arm never faults, and the guest would read it instead of the
// checkpoint's. Files still hold what the guest wrote after the checkpoint.
func (b *builder) memory() error {
	b.drop(func(e *entry) bool {
		switch e.Name {
		case "mem-prealloc":
			b.change("-mem-prealloc removed", "memory must start out empty to be paged in")
			return true
		case "mem-path":
			b.change("-mem-path "+e.Value+" removed", "the file holds what came after the checkpoint; the memory is anonymous now")
			return true
		}
		return false
	})
	for e := range b.named("overcommit", "realtime") {
		for _, key := range []string{"mem-lock", "mlock"} {
			if e.isOn(key) {
				e.kv.Set(key, "off")
				b.change("-"+e.Name+" "+key+"=off", "locking would fill the memory before it can be paged in")
			}
		}
	}
	for e := range b.named("object") {
		if err := b.backend(e); err != nil {
			return err
		}
	}
	return nil
}

func (b *builder) backend(e *entry) error {
	kind, ok := strings.CutPrefix(e.get("qom-type"), "memory-backend-")
	if !ok {
		return nil
	}
	id := e.get("id")
	object := "memory backend " + id
	if e.isOn("prealloc") {
		b.change(object+": prealloc removed", "memory must start out empty to be paged in")
	}
	for _, key := range []string{"prealloc", "prealloc-threads", "prealloc-context"} {
		e.kv.Delete(key)
	}
	switch kind {
	case "ram", "shm":
	case "memfd":
		if e.isOn("hugetlb") {
			for _, key := range []string{"hugetlb", "hugetlbsize"} {
				e.kv.Delete(key)
			}
			b.change(object+": hugetlb removed", "memory is paged in by pages of 4 KiB; the kernel may make transparent huge pages of them")
		}
	case "file":
		if dev := b.persistent(id); dev != "" || e.isOn("pmem") {
			return b.refuse(object, "%s is persistent memory %s: a disk in all but name", e.get("mem-path"), dev).
				WithHint("only memory that is lost at power-off can be restored from a checkpoint")
		}
		if e.isOn("readonly") || e.isOn("rom") {
			return b.refuse(object, "a read-only file backs it").WithHint("attach it as a read-only disk instead")
		}
		// A private file mapping is memory nobody else sees: anonymous memory is
		// the same and takes faults on every kernel. A shared one keeps a file,
		// a nameless fresh one.
		to := "memory-backend-ram"
		if e.isOn("share") {
			to = "memory-backend-memfd"
		}
		path := e.get("mem-path")
		e.kv.Set("qom-type", to)
		for _, key := range fileOnlyProps {
			e.kv.Delete(key)
		}
		b.change(object+": "+to+" instead of the file "+path, "the file holds what came after the checkpoint")
	default:
		return b.refuse(object, "memory of kind %s cannot be restored", kind).
			WithHint("use memory-backend-ram, -memfd or -file")
	}
	return nil
}

// persistent names the device that makes a disk of memory backend id.
func (b *builder) persistent(id string) string {
	for e := range b.named("device") {
		driver := e.get("driver")
		if e.get("memdev") == id && slices.Contains([]string{"nvdimm", "virtio-pmem-pci", "virtio-pmem"}, driver) {
			return "(" + driver + ")"
		}
	}
	return ""
}
