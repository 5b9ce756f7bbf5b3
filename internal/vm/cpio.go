package vm

import (
	"bufio"
	"fmt"
	"io"
	"path"
	"strings"
)

// File types in a mode of the archive.
const (
	typeChar = 0o020000
	typeDir  = 0o040000
	typeFile = 0o100000
)

// An archive writes a cpio archive of the kind an initramfs is made of
// ("newc"). The first error is kept and returned by close.
type archive struct {
	w    *bufio.Writer
	ino  int
	dirs map[string]bool
	err  error
}

func newArchive(w io.Writer) *archive {
	return &archive{w: bufio.NewWriterSize(w, 1<<20), dirs: map[string]bool{".": true}}
}

// file adds a file and the folders above it. Names have no leading slash.
func (a *archive) file(name string, perm int, data []byte) {
	a.dir(path.Dir(name), 0o755)
	a.entry(name, typeFile|perm, 0, 0, data)
}

// dir adds a folder and those above it, each only once.
func (a *archive) dir(name string, perm int) {
	if a.dirs[name] {
		return
	}
	a.dirs[name] = true
	a.dir(path.Dir(name), 0o755)
	a.entry(name, typeDir|perm, 0, 0, nil)
}

// char adds a character device.
func (a *archive) char(name string, perm, major, minor int) {
	a.dir(path.Dir(name), 0o755)
	a.entry(name, typeChar|perm, major, minor, nil)
}

func (a *archive) close() error {
	a.entry("TRAILER!!!", 0, 0, 0, nil)
	if a.err != nil {
		return a.err
	}
	return a.w.Flush()
}

func (a *archive) entry(name string, mode, major, minor int, data []byte) {
	if a.err != nil {
		return
	}
	if uint64(len(data)) > 0xffffffff {
		a.err = fmt.Errorf("initramfs: %s is too large: %d bytes", name, len(data))
		return
	}
	a.ino++
	const links = 1
	header := fmt.Sprintf("070701%08x%08x%08x%08x%08x%08x%08x%08x%08x%08x%08x%08x%08x",
		a.ino, mode, 0, 0, links, 0, len(data), 0, 0, major, minor, len(name)+1, 0)
	a.write(header + name + "\x00")
	a.pad(len(header) + len(name) + 1)
	if a.err == nil {
		_, a.err = a.w.Write(data)
	}
	a.pad(len(data))
}

// pad follows n bytes that began at a multiple of 4 with zeros up to the next.
func (a *archive) pad(n int) { a.write(strings.Repeat("\x00", -n&3)) }

func (a *archive) write(s string) {
	if a.err == nil {
		_, a.err = a.w.WriteString(s)
	}
}
