//! The probe's guest: 160 bytes that do what a kernel does in its first moments and what a half-working KVM gets wrong:
//! go from real to long mode, load an interrupt table, take an interrupt, reload CR3, invalidate a page, and say so.
//!
//! Runs it once in this process. Sets no limit of its own.

#![allow(unsafe_code, reason = "KVM is given memory by address; the block is justified")]

use kvm_bindings::{KVM_MAX_CPUID_ENTRIES, kvm_regs, kvm_userspace_memory_region};
use kvm_ioctls::{Kvm, VcpuExit};

/// Where the code lies and starts, in bytes from 0 as all addresses here.
const CODE_AT: usize = 0x1000;
const PML4_AT: usize = 0x2000;
const PDPT_AT: usize = 0x3000;
const PAGE_DIRECTORY_AT: usize = 0x4000;
const IDT_AT: usize = 0x5000;
const MEMORY: usize = 0x1_0000;
/// Three pages below 4 GiB that Intel's KVM wants for itself, outside the guest's memory.
const TSS_AT: usize = 0xfffb_d000;
/// Offset of the interrupt handler in [`CODE`].
const HANDLER: usize = 0x75;
/// The port that the guest writes to at its end (qemu's isa-debug-exit has the same), and what it writes.
const EXIT_PORT: u16 = 0xf4;
const MARKER: u8 = 0x2a;
/// Exits of the virtual CPU to put up with before the last one.
const MAX_EXITS: usize = 16;

#[rustfmt::skip]
const CODE: [u8; 168] = [
    // 16-bit, CS base 0
    0xfa,                                           // cli
    0x31, 0xc0,                                     // xor ax, ax
    0x8e, 0xd8,                                     // mov ds, ax
    0x66, 0x0f, 0x01, 0x16, 0x98, 0x10,             // lgdtd [gdtr]
    0x0f, 0x20, 0xe0,                               // mov eax, cr4
    0x66, 0x83, 0xc8, 0x20,                         // or eax, PAE
    0x0f, 0x22, 0xe0,                               // mov cr4, eax
    0x66, 0xb8, 0x00, 0x20, 0x00, 0x00,             // mov eax, PML4_AT
    0x0f, 0x22, 0xd8,                               // mov cr3, eax
    0x66, 0xb9, 0x80, 0x00, 0x00, 0xc0,             // mov ecx, EFER
    0x0f, 0x32,                                     // rdmsr
    0x66, 0x0d, 0x00, 0x01, 0x00, 0x00,             // or eax, LME
    0x0f, 0x30,                                     // wrmsr
    0x0f, 0x20, 0xc0,                               // mov eax, cr0
    0x66, 0x0d, 0x01, 0x00, 0x00, 0x80,             // or eax, PG | PE
    0x0f, 0x22, 0xc0,                               // mov cr0, eax
    0x66, 0xea, 0x42, 0x10, 0x00, 0x00, 0x08, 0x00, // jmp 8:long
    // long: 64-bit
    0xb8, 0x10, 0x00, 0x00, 0x00,                   // mov eax, 0x10
    0x8e, 0xd8, 0x8e, 0xc0, 0x8e, 0xd0,             // mov ds, eax; mov es, eax; mov ss, eax
    0xbc, 0x00, 0x80, 0x00, 0x00,                   // mov esp, 0x8000
    0x0f, 0x01, 0x1c, 0x25, 0x9e, 0x10, 0x00, 0x00, // lidt [idtr]
    0xcc,                                           // int3
    0x0f, 0x20, 0xd8,                               // mov rax, cr3
    0x0f, 0x22, 0xd8,                               // mov cr3, rax
    0x0f, 0x01, 0x3c, 0x25, 0x00, 0x90, 0x00, 0x00, // invlpg [0x9000]
    0x8a, 0x04, 0x25, 0x00, 0x70, 0x00, 0x00,       // mov al, [0x7000]
    0xe6, 0xf4,                                     // out EXIT_PORT, al
    0xf4, 0xeb, 0xfd,                               // hlt; jmp to the hlt
    // handler of int3
    0xc6, 0x04, 0x25, 0x00, 0x70, 0x00, 0x00, 0x2a, // mov byte [0x7000], MARKER
    0x48, 0xcf,                                     // iretq
    0x90,
    // gdt: null, 64-bit code, data
    0, 0, 0, 0, 0, 0, 0, 0,
    0, 0, 0, 0, 0, 0x9a, 0x20, 0,
    0, 0, 0, 0, 0, 0x92, 0, 0,
    // gdtr, idtr: limit and address
    0x17, 0x00, 0x80, 0x10, 0x00, 0x00,
    0x3f, 0x00, 0x00, 0x50, 0, 0, 0, 0, 0, 0,
];

/// Why KVM is of no use.
#[derive(Debug, thiserror::Error)]
pub enum GuestError {
    /// A step of setting up failed.
    #[error("{0}")]
    Setup(&'static str, #[source] kvm_ioctls::Error),
    /// The virtual CPU does not run.
    #[error("KVM cannot run the probe's guest")]
    Run(#[source] kvm_ioctls::Error),
    /// It ran into something that a working KVM never does with this guest.
    #[error("KVM stopped the probe's guest: {0}")]
    Stopped(String),
    /// The guest took no interrupt, or never ended.
    #[error("the probe's guest came to a wrong end: {0}")]
    Wrong(String),
}

#[repr(C, align(4096))]
struct Memory([u8; MEMORY]);

impl Memory {
    fn put(&mut self, at: usize, bytes: &[u8]) {
        // All callers are below, with constants.
        for (to, from) in self.0.iter_mut().skip(at).zip(bytes) {
            *to = *from;
        }
    }

    /// The guest's memory before it starts.
    fn with_guest() -> Box<Self> {
        let mut memory = Box::new(Self([0; MEMORY]));
        memory.put(CODE_AT, &CODE);
        // Present and writable; the last one is a page of 2 MiB from address 0.
        memory.put(PML4_AT, &(PDPT_AT | 3).to_le_bytes());
        memory.put(PDPT_AT, &(PAGE_DIRECTORY_AT | 3).to_le_bytes());
        memory.put(PAGE_DIRECTORY_AT, &0x83usize.to_le_bytes());
        // Interrupt gate of vector 3 to code segment 8 (AMD64 manual volume 2, section 4.8.4).
        let [low, high, ..] = (CODE_AT + HANDLER).to_le_bytes();
        memory.put(IDT_AT + 3 * 16, &[low, high, 8, 0, 0, 0x8e]);
        memory
    }
}

/// Runs the guest.
///
/// # Errors
/// See [`GuestError`].
pub fn run() -> Result<(), GuestError> {
    let setup = |what| move |error| GuestError::Setup(what, error);
    let kvm = Kvm::new().map_err(setup("open /dev/kvm"))?;
    let vm = kvm.create_vm().map_err(setup("make a virtual machine"))?;
    vm.set_tss_address(TSS_AT)
        .map_err(setup("place the task state segment"))?;
    let memory = Box::into_raw(Memory::with_guest());
    let region = kvm_userspace_memory_region {
        slot: 0,
        flags: 0,
        guest_phys_addr: 0,
        memory_size: MEMORY as u64,
        userspace_addr: memory as u64,
    };
    // SAFETY: the region is page-aligned, as large as said, and never freed or touched again by this program: the box was
    // given up, and the process ends after the probe.
    unsafe { vm.set_user_memory_region(region) }.map_err(setup("give the virtual machine memory"))?;
    let mut vcpu = vm.create_vcpu(0).map_err(setup("make a virtual CPU"))?;
    let cpuid = kvm
        .get_supported_cpuid(KVM_MAX_CPUID_ENTRIES)
        .map_err(setup("ask for CPU features"))?;
    vcpu.set_cpuid2(&cpuid).map_err(setup("set CPU features"))?;
    let mut sregs = vcpu.get_sregs().map_err(setup("read the CPU's state"))?;
    (sregs.cs.base, sregs.cs.selector) = (0, 0);
    vcpu.set_sregs(&sregs).map_err(setup("set the CPU's state"))?;
    // Bit 1 of the flags is always set.
    let regs = kvm_regs {
        rip: CODE_AT as u64,
        rflags: 2,
        ..Default::default()
    };
    vcpu.set_regs(&regs).map_err(setup("set the CPU's registers"))?;

    for _ in 0..MAX_EXITS {
        match vcpu.run().map_err(GuestError::Run)? {
            VcpuExit::IoOut(EXIT_PORT, [MARKER]) => return Ok(()),
            VcpuExit::IoOut(EXIT_PORT, data) => return Err(GuestError::Wrong(format!("marker {data:02x?}"))),
            VcpuExit::Intr => {}
            VcpuExit::Hlt => return Err(GuestError::Wrong("it halted".into())),
            other => return Err(GuestError::Stopped(format!("{other:?}"))),
        }
    }
    Err(GuestError::Wrong("too many interruptions".into()))
}
