package pager

import (
	"errors"
	"fmt"
	"os"

	"github.com/go-uffd/uffd"
)

// ErrChildrenLost is reported when a client is taken over whose process has
// forked: the userfaultfds of children died with the pager that served them, and
// memory that they had not touched reads as zeros.
var ErrChildrenLost = errors.New("pager: forked children have lost their pager, their missing memory reads zeros")

// AttachState is Attach of a client that can be taken over: what it knows of its
// pages is kept in a file. That is empty at first, see [NewState]. After the
// client was closed, or its process died in whatever way, AttachState with the
// same file goes on from there, in any process: with a File of the same
// userfaultfd, and Regions that are what they were when the file was empty, also
// if memory was moved or unmapped since. Range, PageSize, Offset and whether
// there is a Memory and a BeforeWrite are compared; that Source has the same
// contents is up to the caller. Threads that wait are woken, and ask again.
//
// The file stays the caller's. At any time one client uses it; for another one
// AttachState fails with EWOULDBLOCK. A file of other regions, a damaged one
// where that is found out, and one of another version of this package are errors,
// too. Nothing was served then, and nobody was woken.
//
// The file has one byte for two pages of memory. A page of it is locked in
// memory: see mlock(2), RLIMIT_MEMLOCK.
func (p *Pager) AttachState(f *uffd.File, state *os.File, rs ...Region) (*Client, error) {
	c := newClient(p, f)
	for _, r := range rs {
		if err := c.addRegion(r); err != nil {
			return nil, err
		}
	}
	if err := c.openLedger(state); err != nil {
		return nil, fmt.Errorf("pager: state in %s: %w", state.Name(), err)
	}
	p.add(c)
	return c, nil
}

func (c *Client) openLedger(state *os.File) error {
	l, err := openLedger(state, c.homes)
	if err != nil {
		return err
	}
	c.ledger = l
	err = l.readFrom(c.file)
	if err == nil && l.adopted {
		err = c.takeOver()
	} else if err == nil {
		for _, r := range c.loop.regions {
			r.states = l.states[r.home]
		}
		l.begin(c.loop.regions)
	}
	if err != nil {
		l.close()
	}
	return err
}

// takeOver goes on where another client has ended.
func (c *Client) takeOver() error {
	rs, err := c.ledger.recover(c.homes)
	if err != nil {
		return err
	}
	for i, home := range c.homes {
		if home.Memory != nil {
			c.files[i].adopt(c.ledger.states[i], home.Range.Len/uint64(home.PageSize))
		}
	}
	for _, r := range rs {
		r.around.window = c.aroundPages(r.pageSize)
		if err := c.file.Wake(r.Range); err != nil {
			return err
		}
	}
	c.loop.regions = rs
	return nil
}
