package hangfs

import "github.com/hanwen/go-fuse/v2/fuse"

// The operations that a store uses; all others pass uncounted.

func (g *gate) Lookup(c <-chan struct{}, h *fuse.InHeader, name string, out *fuse.EntryOut) fuse.Status {
	if st := g.pass(); st != fuse.OK {
		return st
	}
	return g.RawFileSystem.Lookup(c, h, name, out)
}

func (g *gate) GetAttr(c <-chan struct{}, in *fuse.GetAttrIn, out *fuse.AttrOut) fuse.Status {
	if st := g.pass(); st != fuse.OK {
		return st
	}
	return g.RawFileSystem.GetAttr(c, in, out)
}

func (g *gate) SetAttr(c <-chan struct{}, in *fuse.SetAttrIn, out *fuse.AttrOut) fuse.Status {
	if st := g.pass(); st != fuse.OK {
		return st
	}
	return g.RawFileSystem.SetAttr(c, in, out)
}

func (g *gate) Mkdir(c <-chan struct{}, in *fuse.MkdirIn, name string, out *fuse.EntryOut) fuse.Status {
	if st := g.pass(); st != fuse.OK {
		return st
	}
	return g.RawFileSystem.Mkdir(c, in, name, out)
}

func (g *gate) Unlink(c <-chan struct{}, h *fuse.InHeader, name string) fuse.Status {
	if st := g.pass(); st != fuse.OK {
		return st
	}
	return g.RawFileSystem.Unlink(c, h, name)
}

func (g *gate) Rmdir(c <-chan struct{}, h *fuse.InHeader, name string) fuse.Status {
	if st := g.pass(); st != fuse.OK {
		return st
	}
	return g.RawFileSystem.Rmdir(c, h, name)
}

func (g *gate) Rename(c <-chan struct{}, in *fuse.RenameIn, from, to string) fuse.Status {
	if st := g.pass(); st != fuse.OK {
		return st
	}
	return g.RawFileSystem.Rename(c, in, from, to)
}

func (g *gate) Link(c <-chan struct{}, in *fuse.LinkIn, name string, out *fuse.EntryOut) fuse.Status {
	if st := g.pass(); st != fuse.OK {
		return st
	}
	return g.RawFileSystem.Link(c, in, name, out)
}

func (g *gate) Open(c <-chan struct{}, in *fuse.OpenIn, out *fuse.OpenOut) fuse.Status {
	if st := g.pass(); st != fuse.OK {
		return st
	}
	return g.RawFileSystem.Open(c, in, out)
}

func (g *gate) Create(c <-chan struct{}, in *fuse.CreateIn, name string, out *fuse.CreateOut) fuse.Status {
	if st := g.pass(); st != fuse.OK {
		return st
	}
	return g.RawFileSystem.Create(c, in, name, out)
}

func (g *gate) Read(c <-chan struct{}, in *fuse.ReadIn, buf []byte) (fuse.ReadResult, fuse.Status) {
	if st := g.pass(); st != fuse.OK {
		return nil, st
	}
	return g.RawFileSystem.Read(c, in, buf)
}

func (g *gate) Write(c <-chan struct{}, in *fuse.WriteIn, data []byte) (uint32, fuse.Status) {
	// After a Writev that was not known below: counted already.
	return g.RawFileSystem.Write(c, in, data)
}

// Writev is what the server asks for first.
func (g *gate) Writev(c <-chan struct{}, in *fuse.WriteIn, data [][]byte) (uint32, fuse.Status) {
	n := 0
	for _, d := range data {
		n += len(d)
	}
	if st := g.passWrite(n); st != fuse.OK {
		return 0, st
	}
	return g.RawFileSystem.Writev(c, in, data)
}

func (g *gate) Fsync(c <-chan struct{}, in *fuse.FsyncIn) fuse.Status {
	if st := g.pass(); st != fuse.OK {
		return st
	}
	return g.RawFileSystem.Fsync(c, in)
}

func (g *gate) Flush(c <-chan struct{}, in *fuse.FlushIn) fuse.Status {
	if st := g.pass(); st != fuse.OK {
		return st
	}
	return g.RawFileSystem.Flush(c, in)
}

func (g *gate) OpenDir(c <-chan struct{}, in *fuse.OpenIn, out *fuse.OpenOut) fuse.Status {
	if st := g.pass(); st != fuse.OK {
		return st
	}
	return g.RawFileSystem.OpenDir(c, in, out)
}

func (g *gate) FsyncDir(c <-chan struct{}, in *fuse.FsyncIn) fuse.Status {
	if st := g.pass(); st != fuse.OK {
		return st
	}
	return g.RawFileSystem.FsyncDir(c, in)
}

func (g *gate) StatFs(c <-chan struct{}, h *fuse.InHeader, out *fuse.StatfsOut) fuse.Status {
	if st := g.pass(); st != fuse.OK {
		return st
	}
	return g.RawFileSystem.StatFs(c, h, out)
}

func (g *gate) Fallocate(c <-chan struct{}, in *fuse.FallocateIn) fuse.Status {
	if st := g.pass(); st != fuse.OK {
		return st
	}
	return g.RawFileSystem.Fallocate(c, in)
}
