//go:build linux

// Command lazyfile serves a file as memory to another process, page by page, as
// that process touches it.
//
//	lazyfile [FILE]
//
// The other process, which never opens the file, hashes the memory; lazyfile
// hashes the file, and fails if the two differ. Without FILE it serves its own
// executable.
package main

import (
	"crypto/sha256"
	"errors"
	"fmt"
	"io"
	"log"
	"os"
	"time"

	"golang.org/x/sys/unix"

	"github.com/go-uffd/uffd"
	"github.com/go-uffd/uffd/examples/internal/twin"
)

func main() {
	log.SetFlags(0)
	log.SetPrefix("lazyfile: ")
	path := "/proc/self/exe"
	if len(os.Args) > 1 {
		path = os.Args[1]
	}
	var err error
	if twin.Second() {
		err = hashMemory(path)
	} else {
		err = serve(path, os.Stdout)
	}
	if err != nil {
		log.Fatal(err)
	}
}

// hashMemory is the second process: it has memory of the file's size, and no
// other idea of the file.
func hashMemory(path string) error {
	info, err := os.Stat(path)
	if err != nil {
		return err
	}
	mem, err := unix.Mmap(-1, 0, roundUp(int(info.Size())), unix.PROT_READ|unix.PROT_WRITE, unix.MAP_PRIVATE|unix.MAP_ANONYMOUS)
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
	if err := twin.Send(f, uffd.RangeOf(mem)); err != nil {
		return err
	}
	_, err = fmt.Printf("%x\n", sha256.Sum256(mem[:info.Size()]))
	return err
}

func roundUp(n int) int {
	size := os.Getpagesize()
	return (n + size - 1) / size * size
}

// serve is the first process.
func serve(path string, out io.Writer) error {
	file, err := os.Open(path)
	if err != nil {
		return err
	}
	defer file.Close()
	info, err := file.Stat()
	if err != nil {
		return err
	}
	if !info.Mode().IsRegular() || info.Size() == 0 {
		return fmt.Errorf("%s: want a regular file that is not empty", path)
	}
	hash := sha256.New()
	if _, err := io.Copy(hash, file); err != nil {
		return err
	}

	answer, stdout, err := os.Pipe()
	if err != nil {
		return err
	}
	defer answer.Close()
	second, err := twin.Start(stdout, path)
	stdout.Close()
	if err != nil {
		return err
	}
	defer second.Release()
	f, mem, err := second.Receive()
	if err != nil {
		return err
	}
	defer f.Close()

	start := time.Now()
	if err := second.Continue(); err != nil {
		return err
	}
	type outcome struct {
		pages int
		err   error
	}
	served := make(chan outcome, 1)
	go func() {
		pages, err := servePages(f, mem, file)
		if err != nil {
			second.Process.Kill() // better none than one with wrong memory
		}
		served <- outcome{pages, err}
	}()
	var sum string
	_, scanErr := fmt.Fscan(answer, &sum)
	waitErr := second.Wait()
	elapsed := time.Since(start)
	f.Close() // ends servePages
	o := <-served
	if err := errors.Join(o.err, waitErr, scanErr); err != nil {
		return err
	}

	fmt.Fprintf(out, "file    %x\n", hash.Sum(nil))
	fmt.Fprintf(out, "memory  %s\n", sum)
	fmt.Fprintf(out, "%d faults, %d bytes, %v\n", o.pages, info.Size(), elapsed.Round(time.Microsecond))
	if sum != fmt.Sprintf("%x", hash.Sum(nil)) {
		return errors.New("the hashes differ")
	}
	return nil
}

// servePages installs a page for each fault until f is closed.
func servePages(f *uffd.File, mem uffd.Range, file io.ReaderAt) (pages int, err error) {
	page := make([]byte, os.Getpagesize())
	for {
		m, err := f.ReadMsg()
		if errors.Is(err, os.ErrClosed) {
			return pages, nil
		}
		if err != nil {
			return pages, err
		}
		fault, ok := m.Pagefault()
		if !ok {
			continue
		}
		n, err := file.ReadAt(page, int64(fault.Addr-mem.Start))
		if err != nil && err != io.EOF {
			return pages, err
		}
		clear(page[n:]) // what lies behind the end of the file
		_, err = f.Copy(fault.Addr, page, 0)
		if errors.Is(err, unix.EEXIST) {
			err = f.Wake(uffd.Range{Start: fault.Addr, Len: uint64(len(page))})
		}
		if errors.Is(err, uffd.ErrGone) {
			return pages, nil
		}
		if err != nil {
			return pages, err
		}
		pages++
	}
}
