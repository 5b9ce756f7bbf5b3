//go:build linux

package main

import (
	"crypto/sha256"
	"encoding/binary"
	"errors"
	"fmt"
	"math/bits"
	"math/rand/v2"
	"os"
	"sync"

	"golang.org/x/sys/unix"
)

// A program is what the example migrates: walkers that change words of memory at
// random, each in pages of its own. What they leave behind depends on every word
// that they have read.
type program struct {
	steps   uint64 // of each walker, until it is over
	walkers [4]walker
}

type walker struct{ random, steps uint64 }

func newProgram(steps uint64) *program {
	p := &program{steps: steps}
	for i := range p.walkers {
		p.walkers[i].random = uint64(i + 1)
	}
	return p
}

// fill makes the memory that the program starts with.
func fill(memory []byte) {
	rand.NewChaCha8([32]byte{}).Read(memory)
}

// run has every walker go on until it has made so many steps.
func (p *program) run(memory []byte, steps uint64) {
	var wg sync.WaitGroup
	for i := range p.walkers {
		wg.Go(func() { p.walkers[i].walk(memory, i, len(p.walkers), steps) })
	}
	wg.Wait()
}

// walk changes pages first, first+every and so on.
func (w *walker) walk(memory []byte, first, every int, steps uint64) {
	size := os.Getpagesize()
	pages := uint64((len(memory)/size - first + every - 1) / every)
	for ; w.steps < steps; w.steps++ {
		w.random ^= w.random << 13
		w.random ^= w.random >> 7
		w.random ^= w.random << 17
		page := first + every*int(w.random>>32%pages)
		word := memory[page*size+int(w.random%uint64(size/8)*8):][:8]
		v := binary.LittleEndian.Uint64(word)
		w.random ^= v >> 60
		binary.LittleEndian.PutUint64(word, bits.RotateLeft64(v, 5)+w.random)
	}
}

// result is what the program has computed.
func (p *program) result(memory []byte) string {
	h := sha256.New()
	h.Write(memory)
	h.Write(p.state())
	return fmt.Sprintf("%x", h.Sum(nil))
}

// state is everything but the memory.
func (p *program) state() []byte {
	b := binary.BigEndian.AppendUint64(nil, p.steps)
	for _, w := range p.walkers {
		b = binary.BigEndian.AppendUint64(b, w.random)
		b = binary.BigEndian.AppendUint64(b, w.steps)
	}
	return b
}

// programOf makes a program of a state that has come from elsewhere.
func programOf(state []byte) (*program, error) {
	p := new(program)
	if len(state) != len(p.state()) {
		return nil, errors.New("the state is of another program")
	}
	p.steps = binary.BigEndian.Uint64(state)
	for i := range p.walkers {
		state = state[8:]
		p.walkers[i].random = binary.BigEndian.Uint64(state)
		state = state[8:]
		p.walkers[i].steps = binary.BigEndian.Uint64(state)
	}
	return p, nil
}

// mapMemory maps memory for a program.
func mapMemory(size int64) ([]byte, error) {
	if int64(int(size)) != size {
		return nil, fmt.Errorf("%d bytes are more than a process can have here", size)
	}
	memory, err := unix.Mmap(-1, 0, int(size), unix.PROT_READ|unix.PROT_WRITE,
		unix.MAP_PRIVATE|unix.MAP_ANONYMOUS|unix.MAP_NORESERVE)
	return memory, os.NewSyscallError("mmap", err)
}
