package pager_test

import (
	"context"
	"expvar"
	"log"

	"github.com/go-uffd/uffd"
	"github.com/go-uffd/uffd/pager"
	"github.com/go-uffd/uffd/source"
)

// A snapshot of a virtual machine's memory and two diffs to it are served to the
// process that opened the userfaultfd.
func Example() {
	serve := func(ctx context.Context, fd, pid int, memory uffd.Range) error {
		var layers []source.Source
		for _, name := range []string{"base.mem", "first.diff", "second.diff"} {
			file, err := source.OpenFile(name)
			if err != nil {
				return err
			}
			defer file.Close()
			layers = append(layers, file)
		}
		f, err := uffd.FromFD(fd)
		if err != nil {
			return err
		}
		defer f.Close()
		pidfd, err := pager.OpenPid(pid)
		if err != nil {
			return err
		}
		defer pidfd.Close()

		p := &pager.Pager{ErrorHook: func(_ *pager.Client, err error) { log.Print(err) }}
		expvar.Publish("pager", expvar.Func(func() any { return p.Stats() }))
		c, err := p.Attach(f, pager.Region{Range: memory, Source: source.Layer(layers[0], layers[1:]...)})
		if err != nil {
			return err
		}
		defer c.Close()
		c.Watch(pidfd)
		return c.Serve(ctx)
	}
	_ = serve
}
