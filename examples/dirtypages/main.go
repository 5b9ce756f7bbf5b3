//go:build linux

// Command dirtypages prints the pages that another process writes.
//
//	dirtypages [-sync]
//
// It write-protects that process's memory. With FeatureWPAsync (Linux 6.7) the
// kernel lifts the protection of a page at its first write, and pagemap shows
// which are left; before that, or with -sync, each first write is a fault to
// answer.
package main

import (
	"encoding/binary"
	"errors"
	"flag"
	"fmt"
	"io"
	"log"
	"os"
	"slices"

	"golang.org/x/sys/unix"

	"github.com/go-uffd/uffd"
	"github.com/go-uffd/uffd/examples/internal/twin"
)

const pages = 64

// written are the pages that the second process writes.
var written = []int{0, 1, 2, 17, 40, 41, 63}

func main() {
	log.SetFlags(0)
	log.SetPrefix("dirtypages: ")
	sync := flag.Bool("sync", false, "answer faults, even if the kernel could")
	flag.Parse()
	var err error
	if twin.Second() {
		err = write(*sync)
	} else {
		err = track(*sync, os.Stdout)
	}
	if err != nil {
		log.Fatal(err)
	}
}

// write is the second process. All its pages exist when they are protected.
func write(sync bool) error {
	mem, err := unix.Mmap(-1, 0, pages*os.Getpagesize(), unix.PROT_READ|unix.PROT_WRITE, unix.MAP_PRIVATE|unix.MAP_ANONYMOUS)
	if err != nil {
		return err
	}
	for i := 0; i < len(mem); i += os.Getpagesize() {
		mem[i] = 1
	}
	config := uffd.Config{Require: uffd.FeaturePagefaultFlagWP}
	if !sync {
		config.Prefer = uffd.FeatureWPAsync
	}
	f, err := uffd.New(&config)
	if err != nil {
		return err
	}
	r := uffd.RangeOf(mem)
	if _, err := f.Register(r, uffd.RegisterWP); err != nil {
		return err
	}
	if err := f.WriteProtect(r, uffd.WriteProtectWP); err != nil {
		return err
	}
	if err := twin.Send(f, r); err != nil {
		return err
	}
	for _, page := range written {
		mem[page*os.Getpagesize()] = 2
	}
	return twin.Send(f, r) // and stay until they are counted
}

// track is the first process.
func track(sync bool, out io.Writer) error {
	second, err := twin.Start(os.Stderr, fmt.Sprintf("-sync=%v", sync))
	if err != nil {
		return err
	}
	defer second.Release()
	f, mem, err := second.Receive()
	if err != nil {
		return err
	}
	defer f.Close()

	async := f.Features().Has(uffd.FeatureWPAsync)
	faults := make(chan []int, 1)
	if !async {
		go func() { faults <- answer(f, mem) }()
	}
	if err := second.Continue(); err != nil {
		return err
	}
	again, _, err := second.Receive() // it has written
	if err != nil {
		return err
	}
	again.Close()

	var dirty []int
	if async {
		dirty, err = unprotected(second.Process.Pid, mem)
		if err != nil {
			return err
		}
	} else {
		f.Close() // ends answer
		dirty = <-faults
	}
	mode := "sync"
	if async {
		mode = "async"
	}
	fmt.Fprintf(out, "%d of %d pages written (%s write protection): %v\n", len(dirty), pages, mode, dirty)
	if !slices.Equal(dirty, written) {
		return fmt.Errorf("want %v", written)
	}
	return nil
}

// answer lifts the protection of each page that is written, until f is closed.
func answer(f *uffd.File, mem uffd.Range) (dirty []int) {
	for {
		m, err := f.ReadMsg()
		if err != nil {
			if !errors.Is(err, os.ErrClosed) {
				log.Print(err)
			}
			slices.Sort(dirty)
			return slices.Compact(dirty)
		}
		fault, ok := m.Pagefault()
		if !ok || !fault.Flags.Has(uffd.PagefaultWP) {
			continue
		}
		size := uint64(os.Getpagesize())
		dirty = append(dirty, int(uint64(fault.Addr-mem.Start)/size))
		if err := f.WriteProtect(uffd.Range{Start: fault.Addr, Len: size}, 0); err != nil {
			log.Print(err)
		}
	}
}

// unprotected returns the pages of mem whose protection is gone.
func unprotected(pid int, mem uffd.Range) (dirty []int, err error) {
	const protected = 1 << 57 // in an entry of pagemap
	pagemap, err := os.Open(fmt.Sprintf("/proc/%d/pagemap", pid))
	if err != nil {
		return nil, err
	}
	defer pagemap.Close()
	entries := make([]uint64, pages)
	raw := make([]byte, 8*pages)
	if _, err := pagemap.ReadAt(raw, int64(mem.Start)/int64(os.Getpagesize())*8); err != nil {
		return nil, err
	}
	for i := range entries {
		if binary.NativeEndian.Uint64(raw[8*i:])&protected == 0 {
			dirty = append(dirty, i)
		}
	}
	return dirty, nil
}
