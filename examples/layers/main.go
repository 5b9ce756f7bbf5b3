//go:build linux

// Command layers serves a snapshot in layers, a base and two diffs on top of it,
// as memory to another process, and prints which layer its pages came from.
//
//	layers
//
// The other process hashes the memory; layers hashes what the layers make up
// together, and fails if the two differ.
package main

import (
	"bytes"
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"io"
	"log"
	"os"
	"path/filepath"

	"golang.org/x/sys/unix"

	"github.com/go-uffd/uffd"
	"github.com/go-uffd/uffd/examples/internal/twin"
	"github.com/go-uffd/uffd/pager"
	"github.com/go-uffd/uffd/source"
)

const pages = 64

func main() {
	log.SetFlags(0)
	log.SetPrefix("layers: ")
	var err error
	if twin.Second() {
		err = hashMemory()
	} else {
		err = serve(os.Stdout)
	}
	if err != nil {
		log.Fatal(err)
	}
}

// hashMemory is the second process.
func hashMemory() error {
	mem, err := unix.Mmap(-1, 0, pages*os.Getpagesize(), unix.PROT_READ|unix.PROT_WRITE, unix.MAP_PRIVATE|unix.MAP_ANONYMOUS)
	if err != nil {
		return err
	}
	f, err := uffd.New(&uffd.Config{Prefer: pager.Events})
	if err != nil {
		return err
	}
	if _, err := f.Register(uffd.RangeOf(mem), uffd.RegisterMissing); err != nil {
		return err
	}
	if err := twin.Send(f, uffd.RangeOf(mem)); err != nil {
		return err
	}
	_, err = fmt.Printf("%x\n", sha256.Sum256(mem))
	return err
}

// snapshot writes the layers: every page of the base, every fourth of the first
// diff, every eighth of the second. The rest of the diffs is holes.
func snapshot(dir string) (layers []source.Source, closeAll func(), err error) {
	var files []*source.File
	closeAll = func() {
		for _, f := range files {
			f.Close()
		}
	}
	size := os.Getpagesize()
	for i, every := range []int{1, 4, 8} {
		name := filepath.Join(dir, fmt.Sprint("layer", i))
		f, err := os.Create(name)
		if err != nil {
			return nil, closeAll, err
		}
		for page := 0; page < pages && err == nil; page += every {
			_, err = f.WriteAt(bytes.Repeat([]byte{byte('A' + i)}, size), int64(page*size))
		}
		if err := errors.Join(err, f.Truncate(int64(pages*size)), f.Close()); err != nil {
			return nil, closeAll, err
		}
		file, err := source.OpenFile(name)
		if err != nil {
			return nil, closeAll, err
		}
		files = append(files, file)
		layers = append(layers, file)
	}
	return layers, closeAll, nil
}

// serve is the first process.
func serve(out io.Writer) error {
	dir, err := os.MkdirTemp("", "layers")
	if err != nil {
		return err
	}
	defer os.RemoveAll(dir)
	layers, closeAll, err := snapshot(dir)
	defer closeAll()
	if err != nil {
		return err
	}
	memory := source.Layer(layers[0], layers[1:]...)

	answer, stdout, err := os.Pipe()
	if err != nil {
		return err
	}
	defer answer.Close()
	second, err := twin.Start(stdout)
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
	p := pager.Pager{ErrorHook: func(_ *pager.Client, err error) { log.Print(err) }}
	c, err := p.Attach(f, pager.Region{Range: mem, Source: memory})
	if err != nil {
		return err
	}
	defer c.Close()
	pidfd, err := pager.OpenPid(second.Process.Pid)
	if err != nil {
		return err
	}
	defer pidfd.Close()
	c.Watch(pidfd) // to know when the process has ended
	served := make(chan error, 1)
	go func() { served <- c.Serve(context.Background()) }()
	if err := second.Continue(); err != nil {
		return err
	}
	var sum string
	_, scanErr := fmt.Fscan(answer, &sum)
	if err := errors.Join(scanErr, second.Wait(), <-served); err != nil {
		return err
	}

	want := sha256.New()
	if _, err := io.Copy(want, io.NewSectionReader(readerAt{memory}, 0, memory.Size())); err != nil {
		return err
	}
	var count [3]int
	for page := range int64(pages) {
		count[memory.Index(page*int64(os.Getpagesize()))]++
	}
	for i, n := range count {
		fmt.Fprintf(out, "layer %d  %d pages\n", i, n)
	}
	n := c.Stats()
	fmt.Fprintf(out, "%d faults, %d pages came along\nmemory   %s\n", n.Demand, n.Around, sum)
	if sum != fmt.Sprintf("%x", want.Sum(nil)) {
		return errors.New("the hashes differ")
	}
	return nil
}

// readerAt reads a Source without a context.
type readerAt struct{ source.Source }

func (r readerAt) ReadAt(p []byte, off int64) (int, error) {
	return r.Source.ReadAt(context.Background(), p, off)
}
