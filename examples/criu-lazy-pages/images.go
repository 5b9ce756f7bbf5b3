//go:build linux

package main

import (
	"bufio"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"

	"github.com/checkpoint-restore/go-criu/v8/crit/images/mm"
	"github.com/checkpoint-restore/go-criu/v8/crit/images/pagemap"
	"github.com/checkpoint-restore/go-criu/v8/crit/images/pstree"
	"github.com/checkpoint-restore/go-criu/v8/crit/images/vma"
	"google.golang.org/protobuf/proto"
)

// The two numbers that an image file begins with: what it is, and of what.
const (
	imageMagic   = 0x54564319
	pstreeMagic  = 0x50273030
	mmMagic      = 0x57492820
	pagemapMagic = 0x56084025
)

// maxRecord is how long a record may be. The longest is that of a process's
// mappings, of which the kernel allows 65530 unless told otherwise.
const maxRecord = 64 << 20

// readImage calls use with each record of an image file.
func readImage(name string, magic uint32, use func(record []byte) error) error {
	f, err := os.Open(name)
	if err != nil {
		return err
	}
	defer f.Close()
	if err := readRecords(bufio.NewReader(f), magic, use); err != nil {
		return fmt.Errorf("%s: %w", name, err)
	}
	return nil
}

func readRecords(r io.Reader, magic uint32, use func(record []byte) error) error {
	var head [2]uint32
	if err := binary.Read(r, binary.LittleEndian, &head); err != nil {
		return fmt.Errorf("no image: %w", err)
	}
	if head != [2]uint32{imageMagic, magic} {
		return fmt.Errorf("it begins with %#x, and an image of this kind and version with %#x", head, [2]uint32{imageMagic, magic})
	}
	for {
		var size uint32
		switch err := binary.Read(r, binary.LittleEndian, &size); {
		case err == io.EOF:
			return nil
		case err != nil:
			return fmt.Errorf("it ends within a record: %w", err)
		case size > maxRecord:
			return fmt.Errorf("a record of %d bytes", size)
		}
		record := make([]byte, size)
		if _, err := io.ReadFull(r, record); err != nil {
			return fmt.Errorf("it ends within a record: %w", io.ErrUnexpectedEOF)
		}
		if err := use(record); err != nil {
			return err
		}
	}
}

// readTree returns the pids of the tasks, among them those of zombies.
func readTree(dir string) (pids []int32, err error) {
	name := filepath.Join(dir, "pstree.img")
	err = readImage(name, pstreeMagic, func(record []byte) error {
		var entry pstree.PstreeEntry
		if err := proto.Unmarshal(record, &entry); err != nil {
			return err
		}
		pid := int32(entry.GetPid())
		if pid <= 0 {
			return fmt.Errorf("%d is not a pid", pid)
		}
		pids = append(pids, pid)
		return nil
	})
	if err == nil && len(pids) == 0 {
		err = fmt.Errorf("%s: there is no task", name)
	}
	return pids, err
}

// readMappings returns the mappings of a task, in the order of their addresses.
func readMappings(dir string, pid int32) ([]*vma.VmaEntry, error) {
	name := filepath.Join(dir, fmt.Sprintf("mm-%d.img", pid))
	var mappings []*vma.VmaEntry
	records := 0
	err := readImage(name, mmMagic, func(record []byte) error {
		var entry mm.MmEntry
		if records++; records > 1 {
			return errors.New("more than one record")
		}
		if err := proto.Unmarshal(record, &entry); err != nil {
			return err
		}
		mappings = entry.GetVmas()
		last := uint64(0)
		for _, m := range mappings {
			if m.GetStart() < last || m.GetEnd() <= m.GetStart() || !wholePages(m.GetStart(), m.GetEnd()) {
				return fmt.Errorf("bad mapping [%#x, %#x)", m.GetStart(), m.GetEnd())
			}
			last = m.GetEnd()
		}
		return nil
	})
	return mappings, err
}

// What an entry of a pagemap says of its pages.
const (
	inParent = 1 << 0 // they are in the image that this one is based on
	lazy     = 1 << 1 // restore leaves them to us
	present  = 1 << 2 // they are in this image
)

// An extent is consecutive pages in an image.
type extent struct {
	start, end uint64
	flags      uint32
	offset     int64 // in the file of pages, if they are present
}

// readPagemap returns the extents of a task's pages, in the order of their addresses,
// and the name of the file that holds them.
func readPagemap(dir string, pid int32) (extents []extent, pages string, err error) {
	name := filepath.Join(dir, fmt.Sprintf("pagemap-%d.img", pid))
	var offset int64
	err = readImage(name, pagemapMagic, func(record []byte) error {
		if pages == "" {
			var head pagemap.PagemapHead
			if err := proto.Unmarshal(record, &head); err != nil {
				return err
			}
			pages = filepath.Join(dir, fmt.Sprintf("pages-%d.img", head.GetPagesId()))
			return nil
		}
		var entry pagemap.PagemapEntry
		if err := proto.Unmarshal(record, &entry); err != nil {
			return err
		}
		e, err := newExtent(&entry)
		if err != nil {
			return err
		}
		if n := len(extents); n > 0 && e.start < extents[n-1].end {
			return fmt.Errorf("pages at %#x come after those up to %#x", e.start, extents[n-1].end)
		}
		if e.flags&present != 0 {
			e.offset = offset
			if offset += int64(e.end - e.start); offset < e.offset {
				return errors.New("more pages than a file can hold")
			}
		}
		extents = append(extents, e)
		return nil
	})
	if err == nil && pages == "" {
		err = fmt.Errorf("%s: it is empty", name)
	}
	return extents, pages, err
}

func newExtent(entry *pagemap.PagemapEntry) (extent, error) {
	start, pages := entry.GetVaddr(), entry.GetNrPages()
	if entry.NrPages == nil { // before CRIU 4.2
		pages = uint64(entry.GetCompatNrPages())
	}
	end := start + pages*pageSize
	if pages == 0 || pages > 1<<63/pageSize || end <= start || !wholePages(start, end) {
		return extent{}, fmt.Errorf("bad entry: %d pages at %#x", pages, start)
	}
	flags := entry.GetFlags()
	switch {
	case entry.GetInParent(): // before CRIU 3.0 there were no flags
		flags |= inParent
	case entry.Flags == nil:
		flags = present
	}
	switch flags {
	case present, present | lazy, inParent, inParent | lazy, lazy:
		return extent{start: start, end: end, flags: flags}, nil
	}
	return extent{}, fmt.Errorf("unknown flags %#x of the pages at %#x: is this image from a newer CRIU?", flags, start)
}

var pageSize = uint64(os.Getpagesize())

func wholePages(start, end uint64) bool { return start%pageSize == 0 && end%pageSize == 0 }
