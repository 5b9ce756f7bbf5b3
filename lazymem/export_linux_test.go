package lazymem

// Waiting returns how many goroutines wait for reads of others.
func (m *Memory) Waiting() (n int) {
	m.mu.Lock()
	defer m.mu.Unlock()
	for _, f := range m.fills {
		n += f.waiting
	}
	return n
}
