# A guest that does nothing but take part in CPU hotplug: it takes every CPU that is inserted and ejects every one it is
# asked to. For unplugs under KVM, where no Linux may boot. It is the whole firmware (-bios eject.bin), so it runs
# milliseconds after the start; real mode, q35's CPU hotplug block (QEMU: docs/specs/acpi_cpu_hotplug.rst).
# Build: gcc -m16 -nostdlib -static -no-pie -Wl,-Ttext=0,--build-id=none,--oformat=binary -o eject.bin eject.S

        .set SELECTOR, 0xcd8            # 32 bits: a first write of 0 leaves the legacy mode
        .set FLAGS, 0xcdc               # read: 2 inserting, 4 removing; write: 2, 4 acknowledge, 8 eject
        .set COMMAND, 0xcdd             # 0: select the next CPU that has an event
        .set PAUSE, 1000                # leaves the host's CPUs to QEMU for a while

        .code16
        .text
        .globl _start
_start: xorl %eax, %eax
        movw $SELECTOR, %dx
        outl %eax, %dx
next:   movw $COMMAND, %dx
        xorb %al, %al
        outb %al, %dx
        movw $FLAGS, %dx
        inb %dx, %al
        testb $2, %al
        jz 1f
        movb $2, %al
        outb %al, %dx
        jmp next
1:      testb $4, %al
        jz idle
        movb $4, %al
        outb %al, %dx
        movb $8, %al
        outb %al, %dx
        jmp next
idle:   movw $PAUSE, %cx
2:      pause
        loop 2b
        jmp next

        .org 0xfff0                     # where an x86 CPU begins, 16 bytes below the end
        jmp _start
        .org 0x10000
