package disk

import (
	"fmt"
	"slices"
	"strings"
)

// Source is one medium that a checkpoint has to hold.
type Source struct {
	Image   string // node of the image itself, Root but for filters
	Root    string // top node, which the device writes to and which has the bitmap
	Device  string // QOM path of the device
	Format  string // driver of the image
	Path    string // its name
	Storage string // driver of what is below it all: file, host_device, nbd
	Bytes   uint64 // size that the guest sees
	Used    uint64 // allocated by the image and those under it, an upper guess for a copy
	Bitmaps []Bitmap
	// File is the node with an encrypted image as it lies there, if it can be copied like
	// that; empty otherwise. The bitmaps are then of that node.
	File string
	// Snapshots are the names of the internal snapshots of the image.
	Snapshots []string
}

// Tracked is the node whose bitmaps say what was written to the medium.
func (s *Source) Tracked() string {
	if s.File != "" {
		return s.File
	}
	return s.Root
}

// Refusal is a reason why a drive cannot be part of a checkpoint.
type Refusal struct{ Code, Object, Reason, Advice string }

// filters pass data on unchanged.
var filters = []string{"throttle", "copy-on-read", "compress", "preallocate", "blklogwrites", "blkdebug"}

// Sources lists the writable media, in the order of QEMU's list, and why some of
// them cannot be taken.
func (g *Graph) Sources() ([]Source, []Refusal) {
	var out []Source
	var refused []Refusal
	for i := range g.Drives {
		d := &g.Drives[i]
		if d.Root == "" || d.ReadOnly || d.QOMPath == "" {
			continue // nothing in it, not written, or used by nobody
		}
		if k := slices.IndexFunc(out, func(s Source) bool { return s.Root == d.Root }); k >= 0 {
			// One cannot be given the filter before the other.
			refused = append(refused, Refusal{"disk-shared", out[k].Device, d.QOMPath + " writes to the same node " + d.Root, "detach one of the two"})
			continue
		}
		s, why := g.source(d)
		if why != nil {
			refused = append(refused, *why)
			continue
		}
		out = append(out, s)
	}
	return out, append(refused, g.nested(out)...)
}

func (g *Graph) source(d *Drive) (Source, *Refusal) {
	root := g.Nodes[d.Root]
	if root == nil {
		return Source{}, &Refusal{"block-graph", d.QOMPath, "its node " + d.Root + " is not in QEMU's list", "try again"}
	}
	image := root
	for steps := 0; slices.Contains(filters, image.Driver); steps++ {
		child := image.Child("file")
		if child == "" {
			child = image.Child("backing")
		}
		if image = g.Nodes[child]; image == nil || steps > len(g.Nodes) {
			return Source{}, &Refusal{"block-graph", root.Name, "there is nothing under its filter", "try again"}
		}
	}
	s := Source{Root: root.Name, Image: image.Name, Device: d.QOMPath, Format: image.Driver, Path: image.Path(),
		Bytes: root.Image.VirtualSize, Bitmaps: root.Bitmaps}
	for n := image; n != nil; n = g.Nodes[n.Child("file")] {
		s.Storage = n.Driver
		if strings.HasPrefix(s.Path, "json:") { // options that no file name can say
			s.Path = n.Path()
		}
	}
	for _, snap := range image.Image.Snapshots {
		s.Snapshots = append(s.Snapshots, snap.Name)
	}
	for _, n := range g.Below(root.Name) {
		s.Used += n.Image.ActualSize
		if Ours(n.Name) {
			return s, &Refusal{"checkpoint-left", root.Name, "an earlier checkpoint's " + n.Name + " is still in its graph",
				"ckagent release takes it out"}
		}
		if n.Encrypted || n.Driver == "luks" {
			if s.File = g.encrypted(image, n); s.File == "" {
				return s, &Refusal{"encrypted-disk", root.Name, "it is encrypted (" + n.Path() + ") below another image, or over a backing file: the store would hold the guest's data in the clear",
					"let the guest encrypt its disk itself, or leave disks out with --disks none"}
			}
			s.Bitmaps = g.Nodes[s.File].Bitmaps
		}
		for _, e := range g.Exports {
			if e.Node == n.Name {
				return s, &Refusal{"disk-exported", root.Name, fmt.Sprintf("%s export %s makes it available to others, whose writes go unseen", e.Type, e.ID),
					"end the export"}
			}
		}
		for _, user := range g.users[n.Name] {
			if j := g.job(user); j != nil && !j.Over() {
				return s, &Refusal{"job-active", j.ID, "a " + j.Type + " job works on " + root.Name, "wait for it to end or cancel it"}
			}
		}
	}
	return s, nil
}

// encrypted is the node below a whole, encrypted image that lies in a file or on a block
// device, and "" for what is encrypted in another way.
func (g *Graph) encrypted(image, n *Node) string {
	file := g.Nodes[n.Child("file")]
	if n != image || n.Child("backing") != "" || file == nil || file.Driver != "file" && file.Driver != "host_device" {
		return ""
	}
	return file.Name
}

func (g *Graph) job(id string) *Job {
	for i := range g.Jobs {
		if id != "" && g.Jobs[i].ID == id {
			return &g.Jobs[i]
		}
	}
	return nil
}

// nested refuses media that lie under one another: a write to the lower one changes
// the upper one's content behind its filter.
func (g *Graph) nested(list []Source) []Refusal {
	var out []Refusal
	for _, upper := range list {
		for _, n := range g.Below(upper.Root)[1:] {
			if slices.ContainsFunc(list, func(s Source) bool { return s.Root == n.Name }) {
				out = append(out, Refusal{"disk-shared", upper.Root, "another device writes to " + n.Name + ", which is under it",
					"detach one of the two"})
			}
		}
	}
	return out
}

// Own picks the bitmaps that checkpoints left on a medium.
func (s *Source) Own() []Bitmap {
	var out []Bitmap
	for _, b := range s.Bitmaps {
		if strings.HasPrefix(b.Name, bitmapPrefix) {
			out = append(out, b)
		}
	}
	return out
}
