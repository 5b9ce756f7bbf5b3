//go:build linux

// Command snapshot writes the memory of another process, as it is at one moment,
// to a file, while that process goes on writing.
//
//	snapshot [FILE]
//
// The other process writes the numbers 1, 2, 3 … to its memory, one after the
// other, at addresses that follow from the number. So the copy shows of which
// moment it is: it has to hold all numbers up to some n where they belong, and
// none that came later.
package main

import (
	"encoding/binary"
	"flag"
	"fmt"
	"io"
	"log"
	"os"

	"golang.org/x/sys/unix"

	"github.com/go-uffd/uffd"
	"github.com/go-uffd/uffd/examples/internal/twin"
	"github.com/go-uffd/uffd/track"
)

const pages = 4096

// page is where a number goes: pages in no order, in which all have their turn.
func page(number uint64) int { return int(number * 2741 % pages) }

func main() {
	log.SetFlags(0)
	log.SetPrefix("snapshot: ")
	flag.Parse()
	var err error
	if twin.Second() {
		err = count()
	} else {
		path := flag.Arg(0)
		if path == "" {
			path = os.DevNull
		}
		err = snapshot(path, os.Stdout)
	}
	if err != nil {
		log.Fatal(err)
	}
}

// count is the second process.
func count() error {
	size := os.Getpagesize()
	mem, err := unix.Mmap(-1, 0, pages*size, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_PRIVATE|unix.MAP_ANONYMOUS)
	if err != nil {
		return err
	}
	f, err := track.OpenSnapshot()
	if err != nil {
		return err
	}
	go func() {
		for number := uint64(1); ; number++ {
			binary.NativeEndian.PutUint64(mem[page(number)*size:], number)
		}
	}()
	return twin.Send(f, uffd.RangeOf(mem)) // until the first process is done
}

// snapshot is the first process.
func snapshot(path string, out io.Writer) error {
	file, err := os.Create(path)
	if err != nil {
		return err
	}
	defer file.Close()
	second, err := twin.Start(os.Stderr)
	if err != nil {
		return err
	}
	defer second.Release()
	f, mem, err := second.Receive()
	if err != nil {
		return err
	}
	s, err := track.StartSnapshot(f, second.Process.Pid, nil, mem)
	if err != nil {
		f.Close()
		return err
	}
	defer s.Stop()
	var copied image
	if _, err := s.WriteTo(io.MultiWriter(file, &copied)); err != nil {
		return err
	}
	last, err := copied.check()
	if err != nil {
		return err
	}
	stats := s.Stats()
	fmt.Fprintf(out, "%d bytes as of number %d; %d writes waited, %v at most\n", stats.Size, last, stats.Stalls, stats.StallMax)
	return file.Close()
}

// An image is the copied memory.
type image []byte

func (m *image) Write(p []byte) (int, error) {
	*m = append(*m, p...)
	return len(p), nil
}

// check returns the last number that was written before the moment of m.
func (m image) check() (last uint64, err error) {
	at := func(page int) uint64 { return binary.NativeEndian.Uint64(m[page*os.Getpagesize():]) }
	for i := range pages {
		if number := at(i); number > 0 && page(number) != i {
			return 0, fmt.Errorf("number %d is at page %d", number, i)
		}
		last = max(last, at(i))
	}
	for number := last - min(last, pages-1); number <= last; number++ {
		if got := at(page(number)); number > 0 && got != number {
			return 0, fmt.Errorf("number %d is not there at the time of %d, but %d", number, last, got)
		}
	}
	return last, nil
}
