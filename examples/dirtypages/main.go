//go:build linux

// Command dirtypages prints the pages that another process writes.
//
//	dirtypages [-sync]
//
// It tracks the process's memory with package track: with FeatureWPAsync (Linux
// 6.7) the kernel keeps the books; before that, or with -sync, each first write is
// a fault to answer.
package main

import (
	"flag"
	"fmt"
	"io"
	"log"
	"os"
	"slices"

	"golang.org/x/sys/unix"

	"github.com/go-uffd/uffd"
	"github.com/go-uffd/uffd/examples/internal/twin"
	"github.com/go-uffd/uffd/track"
)

const pages = 64

// The pages that the second process writes, and those that it writes after they
// have been collected.
var (
	written     = []int{0, 1, 2, 17, 40, 41, 63}
	writtenThen = []int{2, 3}
)

func main() {
	log.SetFlags(0)
	log.SetPrefix("dirtypages: ")
	sync := flag.Bool("sync", false, "answer faults, even if the kernel could")
	flag.Parse()
	var err error
	if twin.Second() {
		err = write(*sync)
	} else {
		err = report(*sync, os.Stdout)
	}
	if err != nil {
		log.Fatal(err)
	}
}

// write is the second process.
func write(sync bool) error {
	mem, err := unix.Mmap(-1, 0, pages*os.Getpagesize(), unix.PROT_READ|unix.PROT_WRITE, unix.MAP_PRIVATE|unix.MAP_ANONYMOUS)
	if err != nil {
		return err
	}
	f, err := open(sync)
	if err != nil {
		return err
	}
	r := uffd.RangeOf(mem)
	for _, list := range [][]int{written, writtenThen} {
		if err := twin.Send(f, r); err != nil { // waits until the first process is ready
			return err
		}
		for _, page := range list {
			mem[page*os.Getpagesize()]++
		}
	}
	return twin.Send(f, r)
}

func open(sync bool) (*uffd.File, error) {
	if sync {
		return uffd.New(&uffd.Config{Require: uffd.FeaturePagefaultFlagWP, Prefer: uffd.FeatureEventRemove})
	}
	return track.Open()
}

// report is the first process.
func report(sync bool, out io.Writer) error {
	second, err := twin.Start(os.Stderr, fmt.Sprintf("-sync=%v", sync))
	if err != nil {
		return err
	}
	defer second.Release()
	f, mem, err := second.Receive()
	if err != nil {
		return err
	}
	w, err := track.Start(f, second.Process.Pid, mem)
	if err != nil {
		f.Close()
		return err
	}
	defer w.Stop()
	for _, want := range [][]int{written, writtenThen} {
		if err := second.Continue(); err != nil {
			return err
		}
		again, _, err := second.Receive() // it has written
		if err != nil {
			return err
		}
		again.Close()

		var dirty []int
		for r, err := range w.Collect() {
			if err != nil {
				return err
			}
			for a := r.Start; a < r.End(); a += uffd.Addr(os.Getpagesize()) {
				dirty = append(dirty, int(a-mem.Start)/os.Getpagesize())
			}
		}
		fmt.Fprintf(out, "%d of %d pages written (%v): %v\n", len(dirty), pages, w.Method(), dirty)
		if !slices.Equal(dirty, want) {
			return fmt.Errorf("want %v", want)
		}
	}
	return nil
}
