//go:build linux

// Command manpage is the demonstration of userfaultfd(2)'s manual page: memory
// of some pages, read every 1024 bytes, whose pages a handler fills with letters
// as they are touched.
//
//	manpage [PAGES]
//
// The handler is another process: in Go a goroutine must not serve faults of its
// own process.
package main

import (
	"bytes"
	"errors"
	"fmt"
	"log"
	"os"
	"strconv"

	"golang.org/x/sys/unix"

	"github.com/go-uffd/uffd"
	"github.com/go-uffd/uffd/examples/internal/twin"
)

func main() {
	log.SetFlags(0)
	log.SetPrefix("manpage: ")
	pages := 3
	if len(os.Args) > 1 {
		var err error
		if pages, err = strconv.Atoi(os.Args[1]); err != nil || pages < 1 {
			log.Fatalf("want a number of pages, not %q", os.Args[1])
		}
	}
	var err error
	if twin.Second() {
		err = read(pages)
	} else {
		err = handle(pages, os.Stdout)
	}
	if err != nil {
		log.Fatal(err)
	}
}

func letter(page int) byte { return byte('A' + page%20) }

// read is the second process: it reads its memory, and checks what it finds.
func read(pages int) error {
	mem, err := unix.Mmap(-1, 0, pages*os.Getpagesize(), unix.PROT_READ|unix.PROT_WRITE, unix.MAP_PRIVATE|unix.MAP_ANONYMOUS)
	if err != nil {
		return err
	}
	f, err := uffd.New(nil)
	if err != nil {
		return err
	}
	if _, err := f.Register(uffd.RangeOf(mem), uffd.RegisterMissing); err != nil {
		return err
	}
	fmt.Printf("Address returned by mmap() = %v\n", uffd.RangeOf(mem).Start)
	if err := twin.Send(f, uffd.RangeOf(mem)); err != nil {
		return err
	}
	for i := 0xf; i < len(mem); i += 1024 { // not at the start of a page
		b := mem[i]
		fmt.Printf("Read address %v in the second process: %c\n", uffd.RangeOf(mem[i:]).Start, b)
		if want := letter(i / os.Getpagesize()); b != want {
			return fmt.Errorf("read %c, want %c", b, want)
		}
	}
	return nil
}

// handle is the first process.
func handle(pages int, out *os.File) error {
	second, err := twin.Start(out, strconv.Itoa(pages))
	if err != nil {
		return err
	}
	defer second.Release()
	f, mem, err := second.Receive()
	if err != nil {
		return err
	}
	defer f.Close()
	if err := second.Continue(); err != nil {
		return err
	}
	exited := make(chan error, 1)
	go func() {
		exited <- second.Wait()
		f.Close() // ends the loop
	}()
	for {
		m, err := f.ReadMsg()
		if errors.Is(err, os.ErrClosed) {
			return <-exited
		}
		if err != nil {
			return err
		}
		fault, ok := m.Pagefault()
		if !ok {
			return fmt.Errorf("unexpected %v", &m)
		}
		fmt.Fprintf(out, "\n    %v\n", &m)
		index := int(fault.Addr-mem.Start) / os.Getpagesize()
		n, err := f.Copy(fault.Addr, bytes.Repeat([]byte{letter(index)}, os.Getpagesize()), 0)
		if errors.Is(err, unix.EEXIST) { // a signal made the thread fault again
			err = f.Wake(uffd.Range{Start: fault.Addr, Len: uint64(os.Getpagesize())})
		}
		if err != nil {
			return err
		}
		fmt.Fprintf(out, "        (Copy returned %d)\n", n)
	}
}
